"""Where the records of a run go beside log.jsonl: TensorBoard's events, Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gptkernels.core.files import make_folder, replacing
from gptkernels.core.optional import optional
from gptkernels.gpt.training.config import TrainConfig

_PROJECT = "gptkernels"


class Sink(Protocol):
    """What takes the records of a run."""

    def begin(self, about: Mapping[str, Any], resumed: bool) -> None:
        """Before the first record: `about` says what the run is."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record, which has a "step"."""

    def close(self) -> None:
        """After the last record; also where nothing was begun."""


def sinks_of(out: Path, config: TrainConfig) -> tuple[Sink, ...]:
    """Those that `config` asks for. Raises ImportError, in one sentence, where a package of theirs
    is missing."""
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard"))
    if config.wandb:
        sinks.append(WeightsAndBiases(out, config.wandb_project))
    return tuple(sinks)


class TensorBoard:
    """Numbers as scalars and samples as texts, in a folder of TensorBoard's events."""

    def __init__(self, folder: Path) -> None:
        missing = "logging to TensorBoard needs the package 'tensorboard': pip install tensorboard"
        self._writer_type = optional("torch.utils.tensorboard", missing).SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def begin(self, about: Mapping[str, Any], resumed: bool) -> None:
        """Nothing: the writer needs the first record's step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record."""
        step = record["step"]
        if self._writer is None:  # later steps of a killed run are hidden
            self._writer = self._writer_type(self._folder, purge_step=step)
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with all records and what the run is; a resumed run goes on under
    the same id, which is kept in `out`/wandb.

    Its own variables say the rest: WANDB_MODE=offline writes into `out`/wandb alone.
    """

    def __init__(self, out: Path, project: str | None) -> None:
        missing = "logging to Weights & Biases needs wandb: pip install 'gptkernels[wandb]'"
        self._wandb = optional("wandb", missing)
        self._out = out
        self._project = project or os.environ.get("WANDB_PROJECT") or _PROJECT
        self._run: Any = None

    def begin(self, about: Mapping[str, Any], resumed: bool) -> None:
        """Begin a run, or go on with it. Raises RuntimeError, in one sentence, where wandb begins
        none, as without a login."""
        path = self._out / "wandb" / "id"
        before = path.read_text(encoding="utf-8") if resumed and path.is_file() else None
        try:
            self._run = self._wandb.init(
                project=self._project,
                name=self._out.resolve().name,
                id=before,
                resume="allow",
                dir=self._out,
                config=dict(about),
                settings=self._wandb.Settings(console="off", quiet=True),
            )
        except self._wandb.Error as error:
            raise RuntimeError(f"wandb: {str(error).splitlines()[0]}") from error
        # wandb drops a step that is not later than the last one. A run that was killed makes the
        # steps after its checkpoint again.
        self._run.define_metric("*", step_metric="step")
        make_folder("out", path.parent)
        with replacing(path) as file:
            file.write_text(self._run.id, encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record; what is None in it has no point in a chart."""
        self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self) -> None:
        """Wait until everything is sent, or written."""
        if self._run is not None:
            self._run.finish()
