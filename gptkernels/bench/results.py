"""Files of rows: JSON, under a head that says where the rows come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptkernels.bench.environment import environment
from gptkernels.core.files import make_folder, replacing

Row = dict[str, Any]

# What two runs must share for their rows to stand in one file.
_SAME = (
    "commit",
    "gptkernels",
    "python",
    "platform",
    "processor",
    "cpu_threads",
    "versions",
    "gpu",
)


def write_json(path: Path | str, content: Any) -> None:
    """Writes `content` as JSON; a reader sees the old file or the new one, never half of one.

    Parent folders are made. Raises OSError when the file cannot be written.
    """
    path = Path(path)
    make_folder(f"the parent of {path}", path.parent)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path | str) -> dict[str, Any]:
    """A results file. Raises ValueError, in one sentence, for a file that is none, and OSError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content["rows"], list) and isinstance(content["environment"], dict):
            found: dict[str, Any] = content
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no results file of gptkernels")


class Results:
    """The rows of one run. With a path they are written, with all before, as they come.

    Args:
        path: the file; None keeps the rows in memory alone.
        head: what stands in the file besides environment and rows.
        resume: go on with the rows of the file, where it is there.

    Raises:
        ValueError: the file to go on with is no results file, or of another machine or version.
    """

    def __init__(
        self, path: Path | str | None = None, *, resume: bool = False, **head: Any
    ) -> None:
        self.path = path
        here = environment()
        self.content: dict[str, Any] = {"environment": here, **head, "finished": False, "rows": []}
        if resume and path is not None and Path(path).exists():
            old = read(path)
            was, now = _same(old["environment"]), _same(here)
            other = next((name for name in _SAME if was[name] != now[name]), None)
            if other is not None:
                raise ValueError(
                    f"{path} holds rows of another {other.replace('_', ' ')} ({was[other]}, here "
                    f"{now[other]}), so this run cannot go on with it; name another file"
                )
            self.content["rows"] = old["rows"]
        self._write()

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, *rows: Row) -> None:
        """Adds rows, all or none of which a reader sees."""
        self.content["rows"] += rows
        self._write()

    def finish(self) -> None:
        """Says that no row is missing."""
        self.content["finished"] = True
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)


def _same(environment: dict[str, Any]) -> dict[str, Any]:
    processor = {k: v for k, v in environment.get("cpu", {}).items() if k != "load"}
    found = {**environment, "processor": processor}
    return {name: found.get(name) for name in _SAME}


def recorded(rows: Iterable[Row], path: Path | str | None) -> Iterator[Row]:
    """Passes rows through, and writes all so far to `path` after each one, as `Results` does.

    A run that is cut short thus leaves a complete file of the rows it had; its "finished" is false.
    """
    results = Results(path)
    for row in rows:
        results.add(row)
        yield row
    results.finish()
