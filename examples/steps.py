"""What the studies in this folder share: training that goes on where it was stopped, and the CPU
time that all of it took."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptkernels.bench.results import write_json
from gptkernels.cli.console import plain_console
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.progress import ProgressBar
from gptkernels.gpt.training.train import resume, train


def pretrain(
    files: Sequence[Path],
    out: Path,
    shape: GPTConfig,
    training: TrainConfig,
    *,
    init: Path | None = None,
) -> None:
    """Train a new model of this shape, or the one in `init`; or go on where training was stopped;
    nothing where it is finished."""
    with ProgressBar(plain_console()) as bar:
        if not (out / "checkpoint.pt").exists():
            model = None if init else shape
            train(files, out, model=model, init=init, config=training, observer=bar)
        elif not (out / "model").exists():
            resume(out, observer=bar)


@contextmanager
def counted(path: Path) -> Iterator[None]:
    """Add the CPU seconds of what happens in this context to those in the file `path`: of all
    threads, and of the processes that were waited for."""
    before = _cpu_seconds()
    try:
        yield
    finally:
        earlier = json.loads(path.read_text()) if path.exists() else 0.0
        write_json(path, earlier + _cpu_seconds() - before)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
