"""What a training run writes down as it goes: log.jsonl and, if asked for, TensorBoard's events."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptkernels.core.files import make_folder, replacing
from gptkernels.core.optional import optional


class Log:
    """The records of a run, each a line of `out`/log.jsonl; with `tensorboard`, its numbers as
    scalars in `out`/tensorboard too.

    Raises ImportError, in one sentence, where `tensorboard` is asked for and not installed.
    """

    def __init__(self, out: Path, tensorboard: bool) -> None:
        self.out = out
        self.records: list[dict[str, Any]] = []
        self._writer_type: Any = None
        if tensorboard:
            missing = (
                "logging to TensorBoard needs the package 'tensorboard': pip install tensorboard"
            )
            self._writer_type = optional("torch.utils.tensorboard", missing).SummaryWriter
        self._writer: Any = None

    def take_up(self, step: int, due: Collection[str] = ()) -> None:
        """Keep what an earlier run wrote, up to `step`: later steps will be made again, and so will
        what is `due` at this one, a "validation" or a "sample"."""
        path = self.out / "log.jsonl"
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # a killed run may have left half a line
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path} has a line that is not a record of a run: {line[:80]}")
            kind = "sample" if "sample" in record else "validation"
            if record["step"] < step or (record["step"] == step and kind not in due):
                self.records.append(record)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        if lines == path.read_text(encoding="utf-8"):
            return
        with replacing(path, alone=True) as shorter:
            shorter.write_text(lines, encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Add a record, which has a "step". Raises OSError where it cannot be written."""
        # Opened for each line: a crash loses no line.
        path = self.out / "log.jsonl"
        make_folder("out", self.out)  # somebody may have cleaned it away meanwhile
        try:
            with path.open("a" if self.records else "w", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:  # from a write, which does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
        self.records.append(record)
        if self._writer_type is None:
            return
        if self._writer is None:  # later steps of a killed run are hidden
            self._writer = self._writer_type(self.out / "tensorboard", purge_step=record["step"])
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])
            elif isinstance(value, str):
                self._writer.add_text(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()
