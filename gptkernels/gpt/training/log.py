"""What a training run writes down as it goes: log.jsonl, and its sinks (sinks.py)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.files import make_folder, replacing
from gptkernels.gpt.training.sinks import Sink

NAME = "log.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a log.jsonl, up to a line that a killed run left half. Raises ValueError for a
    line of JSON that is no record, OSError where the file cannot be read."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # a killed run may have left half a line
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path} has a line that is not a record of a run: {line[:80]}")
        records.append(record)
    return records


class Log:
    """The records of a run, each a line of `out`/log.jsonl, and handed to each of `sinks`."""

    def __init__(self, out: Path, sinks: Sequence[Sink] = ()) -> None:
        self.out, self._sinks = out, sinks
        self.records: list[dict[str, Any]] = []
        self._resumed = False

    def begin(self, about: Mapping[str, Any]) -> None:
        """Tell the sinks what the run is, after `take_up`. Raises what they raise."""
        for sink in self._sinks:
            sink.begin(about, self._resumed)

    def take_up(self, step: int, due: Collection[str] = ()) -> None:
        """Keep what an earlier run wrote, up to `step`: later steps will be made again, and so will
        what is `due` at this one, a "validation" or a "sample"."""
        self._resumed = True
        path = self.out / NAME
        if not path.is_file():
            return
        for record in read(path):
            kind = "sample" if "sample" in record else "validation"
            if record["step"] < step or (record["step"] == step and kind not in due):
                self.records.append(record)
        lines = "".join(json.dumps(record) + "\n" for record in self.records).encode()
        if lines == path.read_bytes():
            return
        with replacing(path, alone=True) as shorter:
            shorter.write_bytes(lines)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record, which has a "step". Raises OSError where it cannot be written."""
        # Opened for each line: a crash loses no line.
        path = self.out / NAME
        make_folder("out", self.out)  # somebody may have cleaned it away meanwhile
        try:
            with path.open("a" if self.records else "w", encoding="utf-8", newline="\n") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:  # from a write, which does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
        self.records.append(record)
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close what is open."""
        for sink in self._sinks:
            sink.close()
