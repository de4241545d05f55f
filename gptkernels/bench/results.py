"""Files of rows: JSON, under a head that says where the rows come from."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptkernels.bench.environment import environment
from gptkernels.core.files import make_folder, replacing

Row = dict[str, Any]

# What two runs must share for their rows to stand in one file.
_SAME = (
    "commit", "gptkernels", "python", "platform", "processor", "cpu_threads", "versions", "gpu",
    "level", "peers", "device",
)  # fmt: skip


def case_of(row: Row) -> tuple[str, str, str, str]:
    """What the rows of one case have in common: op, shape, dtype and direction."""
    return row["op"], row["shape"], row["dtype"], row["direction"]


def write_json(path: Path | str, content: Any) -> None:
    """Writes `content` as JSON; a reader sees the old file or the new one, never half of one.

    JSON has no NaN and no infinity, which an error may be: they become null. Parent folders are
    made. Raises OSError when the file cannot be written.
    """
    path = Path(path)
    make_folder(f"the parent of {path}", path.parent)
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read(path: Path | str) -> dict[str, Any]:
    """A results file. Raises ValueError, in one sentence, for a file that is none, and OSError."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content["rows"], list) and isinstance(content["environment"], dict):
            found: dict[str, Any] = content
            return found
    raise ValueError(f"{path} is no results file of gptkernels")


def refuse_unfinished(path: Path | str) -> None:
    """Raises ValueError where a new run would overwrite one that may go on."""
    try:
        content = read(path)
    except (OSError, ValueError):
        return
    if content["rows"] and not content["finished"]:
        raise ValueError(
            f"{path} holds an unfinished run of {len(content['rows'])} rows: --resume goes on with "
            "it; delete it, or name another file, to begin anew"
        )


class Results:
    """The rows of one run. With a path they are written, with all before, as they come.

    Args:
        path: the file; None keeps the rows in memory alone.
        resume: go on with the rows of the file, where it is there.

    Raises:
        ValueError: the file to go on with is no results file, or of another machine or version.
    """

    def __init__(self, path: Path | str | None = None, *, resume: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment(), "finished": False, "rows": []}
        self._old: dict[str, Any] | None = None
        if resume and path is not None and Path(path).exists():
            self._old = read(path)
            self._check_same()
            self.content["rows"] = self._old["rows"]

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def begin(self, **head: Any) -> None:
        """Writes the file, with more in its head. Raises ValueError where the file to go on with
        has another level, device or other peers."""
        rows = self.content.pop("rows")
        self.content |= {**head, "rows": rows}
        self._check_same()
        self._write()

    def add(self, *rows: Row) -> None:
        """Adds rows in place of others of their cases. A reader sees all of them or none."""
        cases = {case_of(row) for row in rows}
        kept = [row for row in self.rows if case_of(row) not in cases]
        self.content["rows"] = [*kept, *rows]
        self._write()

    def finish(self) -> None:
        """Says that no row is missing."""
        self.content["finished"] = True
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)

    def _check_same(self) -> None:
        if self._old is None:
            return
        was, now = sameness(self._old), sameness(self.content)
        other = next((n for n in _SAME if n in now and was.get(n) != now[n]), None)
        if other is not None:
            raise ValueError(
                f"{self.path} holds rows of another {other.replace('_', ' ')} ({was.get(other)}, "
                f"here {now[other]}), so this run cannot go on with it; name another file"
            )


def sameness(content: dict[str, Any]) -> dict[str, Any]:
    """What a file is of, as far as it says so; the load is no part of it."""
    here = content["environment"]
    processor = {k: v for k, v in here.get("cpu", {}).items() if k != "load"}
    return {**content, **here, "processor": processor}


def recorded(rows: Iterable[Row], path: Path | str | None) -> Iterator[Row]:
    """Passes rows of any kind through, and writes all so far to `path` after each one.

    A run that is cut short thus leaves a complete file of the rows it had; its "finished" is false.
    """
    results = Results(path)
    results.begin()
    for row in rows:
        results.rows.append(row)
        results.begin()
        yield row
    results.finish()
