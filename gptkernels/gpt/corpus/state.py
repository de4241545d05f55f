"""How far a run is: one SQLite database in the folder that it writes, removed at its end.

The files are written and synced first, then one transaction says how long they are and how many
records that took, together with all that was seen of them (duplicates.py). After a kill at any
moment the database therefore describes an earlier moment of the same run, and the files, cut to the
lengths it says, are those of that moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "state.sqlite"
COUNTS = (
    "files",
    "records",
    "scored",
    "malformed",
    "kept",
    "documents",
    "tokens",
    "characters",
    "utf8_bytes",
    "words",
)
_CACHE_KIB = 64 << 10
_SCHEMA = "CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL)"


@dataclass
class Progress:
    """What a run has done so far.

    Fields:
        counts, dropped: as in the manifest.
        kept_last: whether the last record was kept, so that the next may go on with it.
        shards: tokens and documents of each, as Writer has them.
        malformed_bytes: the length of malformed.jsonl.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    kept_last: bool = False
    shards: list[list[int]] = field(default_factory=list)
    malformed_bytes: int = 0


class State:
    """The database in `folder`, made where there is none; `run` describes what is done there.

    Raises ValueError where another run was begun in the folder, or the database is broken.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._folder = folder
        self.database = sqlite3.connect(folder / NAME)
        try:
            self.database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self.database.execute(_SCHEMA)
            begun = self._get("run")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"out: {folder / NAME} cannot be read ({error}): remove the folder and begin again"
            ) from None
        if begun is not None:
            check_same(folder, begun, run)
        self._set("run", run)
        self.database.commit()

    def progress(self) -> Progress:
        """As of the last commit."""
        return Progress(**(self._get("progress") or {}))

    def commit(self, progress: Progress) -> None:
        """Keep it, and what was seen of the records up to there."""
        self._set("progress", dataclasses.asdict(progress))
        self.database.commit()

    def close(self) -> None:
        """Forget what was not committed."""
        self.database.close()

    def _get(self, key: str) -> Any:
        row = self.database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _set(self, key: str, value: Any) -> None:
        self.database.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, json.dumps(value)))


def remove(folder: Path) -> None:
    """Remove the database from `folder`, where there is one."""
    for name in (NAME, f"{NAME}-journal"):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def in_one_sentence(folder: Path) -> Iterator[None]:
    """In this context, an error of the database in `folder` is an OSError that names it."""
    try:
        yield
    except sqlite3.DatabaseError as error:  # of a full disk, for one
        raise OSError(f"out: {folder / NAME}: {error}") from None


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, which names what differs, where what was done in `folder` before is not
    what is asked now. An input is the same by its place, bytes and sum, not by its name."""
    different = [*_other_inputs(before["inputs"], now["inputs"])]
    for values in ("options", "versions"):
        if values in now:
            different += _other_values(before[values], now[values])
    if different:
        raise ValueError(
            f"out: {folder} was begun with {' and '.join(different)}; name another folder or "
            "remove it"
        )


def _other_inputs(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> Iterator[str]:
    if len(before) != len(now):
        yield f"{len(before)} inputs, not {len(now)}"
        return
    for old, new in zip(before, now, strict=True):
        if (old["bytes"], old["sha256"]) != (new["bytes"], new["sha256"]):
            yield f"another input than {new['name']}"
            return


def _other_values(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name} {old}, not {new}"
