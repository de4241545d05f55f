"""The demo: one run that shows what the package does, on real text, on whatever machine there is.

    1. tune    measure what is the fastest on this machine, which impl="auto" then takes
    2. train   a small GPT-2-shaped model for about `minutes` minutes, validation loss falling
    3. beside  a share of the same steps in plain PyTorch: the losses agree
    4. sample  from the trained model
    5. twin    the same weights in plain PyTorch: logits, loss and gradients agree up to rounding
    6. parity  every op, implementation, dtype and direction, held to the truth in fp64
    7. speed   the ops and a whole training step against plain PyTorch

Everything is printed and written to a folder: report.html (self-contained), loss.png, parity.json,
speed.json, summary.json, and training/ as `gptkernels train` leaves it. Nothing is downloaded: the
default text is the reference manual that every Python carries, `pydoc_data.topics`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gptkernels.bench import report as bench_report
from gptkernels.bench.environment import environment
from gptkernels.bench.report.words import count
from gptkernels.cli.console import STYLES, plain_console, print_text
from gptkernels.cli.demo import beside, tuning
from gptkernels.cli.demo.checks import Checks
from gptkernels.cli.demo.parity import parity_table
from gptkernels.cli.demo.speed import fastest_threads, speed_table
from gptkernels.cli.demo.training import Task, sample, task, train_model
from gptkernels.cli.demo.twin import twin_table
from gptkernels.core.lock import alone_in

# Seconds of the parts that have no limit of their own, on two cores of a CPU.
_CHECKS_S, _TIMES_S = 60.0, 60.0
# What an earlier demo left: beside a newer part of it, it would pass for the whole.
_OLD = (
    *("report.html", "summary.json", "parity.json", "speed.json", "loss.png"),
    *("training/checkpoint.pt", "training/log.jsonl", "training/loss.png"),
    *("training/model/config.json", "training/model/model.safetensors"),
)
_OWN = {"text.txt", *(name.split("/")[0] for name in _OLD)}


def run(
    *,
    text: str | Path | None = None,
    out: str | Path = "demo-report",
    minutes: float = 2.0,
    device: str = "auto",
    seed: int = 1337,
    console: Console | None = None,
) -> int:
    """Run the demo and write the folder `out`; what an earlier demo left there is replaced.

    `text` is a UTF-8 file, None for Python's own manual; `minutes` is the time to train. Returns 0,
    or 1 when a parity check failed. Raises FileNotFoundError or ValueError for a text that cannot
    be trained on, ValueError for `minutes` that are not positive, an unknown device or an `out` in
    use by another demo or with files that no demo wrote, NotADirectoryError for an `out` that is a
    file, ImportError when an extra is missing, all before anything is written; KeyboardInterrupt,
    with a sentence about what is written by then, when it is interrupted.
    """
    out, console = Path(out), console or plain_console()
    wanted = task(text, minutes, device, seed)
    bench_report.check(out)
    _check_own(out)
    with alone_in("out", out):
        for name in _OLD:
            (out / name).unlink(missing_ok=True)
        try:
            return _run(wanted, out, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: the demo is not complete, and {out} holds no report"
            ) from None


def _check_own(out: Path) -> None:
    """Raises ValueError where `out` is no folder of a demo: files of a demo's names would go."""
    foreign = sorted({path.name for path in out.iterdir()} - _OWN) if out.is_dir() else []
    foreign = [name for name in foreign if not name.startswith(".")]  # a lock, a desktop's notes
    if foreign:
        raise ValueError(f"out: {out} holds {foreign[0]}, which no demo wrote; name another folder")


def _run(wanted: Task, out: Path, console: Console) -> int:
    from gptkernels.cli.demo.report import write  # needs what was checked

    started = time.perf_counter()
    _announce(wanted, out, console)
    with _quiet(), fastest_threads(wanted.device):
        tuned = tuning.tune_model(wanted.device, console)
        trained = train_model(wanted, out, console)
        plainly = beside.train_beside(trained, console)
        sampled = sample(trained, console)
        twin_rows = twin_table(trained, console)
        parity_rows = parity_table(wanted.device, console)
        speed_rows = speed_table(trained, console)
        measured_on = environment()
    checks = Checks.of([*twin_rows, *parity_rows], speed_rows)
    seconds = time.perf_counter() - started
    content = {
        "passed": checks.failed == 0,
        "checks": dataclasses.asdict(checks),
        "seconds": seconds,
        "environment": measured_on,
        "device": str(wanted.device),
        "text": wanted.text,
        "model": dataclasses.asdict(wanted.model),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "training": dataclasses.asdict(wanted.config),
        "best_validation_loss": trained.result.best_validation_loss,
        "records": trained.records,
        "plain": plainly.as_dict(),
        "sample": sampled,
        "twin": twin_rows,
        "tuned": tuned,
    }
    write(out, content, checks, plainly, parity_rows, speed_rows)
    console.print()
    style = STYLES["fail" if checks.failed else "pass"]
    print_text(console, f"{checks}, after {seconds:.0f} s.", style)
    for line in checks.skips:
        print_text(console, f"  skipped {line}", STYLES["skipped"])
    print_text(console, f"Report: {out / 'report.html'}")
    return 1 if checks.failed else 0


def _announce(wanted: Task, out: Path, console: Console) -> None:
    training_s = 60 * (wanted.config.minutes or 0)
    parts = {
        "tuning": tuning.SECONDS,
        "training": training_s,
        "the same in plain PyTorch": beside.SHARE * training_s,
        "checks": _CHECKS_S,
        "timing": _TIMES_S,
    }
    takes = count(math.ceil(sum(parts.values()) / 60), "minute")
    print_text(console, f"This demo takes about {takes} and writes {out}. Ctrl-C ends it.", "bold")
    said = ", ".join(f"{seconds:.0f} s of {part}" for part, seconds in parts.items())
    print_text(console, f"On two idle cores about: {said}.", "dim")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other packages' warnings and chatter would bury what the demo has to say."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
