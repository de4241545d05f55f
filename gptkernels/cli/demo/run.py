"""The demo: one run that shows what the package does, on real text, on whatever machine there is.

    1. tune    measure what is the fastest on this machine, which impl="auto" then takes
    2. train   a small GPT-2-shaped model for about `minutes` minutes, validation loss falling
    3. sample  from it
    4. twin    the same weights in plain PyTorch: logits, loss and gradients agree up to rounding
    5. parity  every op, implementation, dtype and direction, held to the truth in fp64
    6. speed   the ops and a whole training step against plain PyTorch

Everything is printed and written to a folder: report.html (self-contained), loss.png, parity.json,
speed.json, summary.json, and training/ as `gptkernels train` leaves it. Nothing is downloaded: the
default text is the reference manual that every Python carries, `pydoc_data.topics`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from gptkernels.bench.environment import environment
from gptkernels.cli.demo.parity import parity_table
from gptkernels.cli.demo.report import write
from gptkernels.cli.demo.speed import fastest_threads, speed_table
from gptkernels.cli.demo.training import PROMPT, sample, train_model
from gptkernels.cli.demo.tuning import tune_model
from gptkernels.cli.demo.twin import twin_table
from gptkernels.core.device import choose_device
from gptkernels.core.lock import alone_in


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
    use by another demo, ImportError when an extra is missing.
    """
    out = Path(out)
    with alone_in("out", out):
        return _run(text, out, minutes, device, seed, console or Console(highlight=False))


def _run(
    text: str | Path | None, out: Path, minutes: float, device: str, seed: int, console: Console
) -> int:
    started = time.perf_counter()
    where = choose_device(device)
    with _quiet(), fastest_threads(where):
        tuned = tune_model(where, console)
        trained = train_model(text, out, minutes, device, seed, console)
        sampled = sample(trained.result.model, seed, console)
        twin_rows = twin_table(trained, console)
        parity_rows = parity_table(trained.device, console)
        speed_rows = speed_table(trained, console)
        measured_on = environment()
    right = all(row["status"] != "fail" for row in [*twin_rows, *parity_rows])
    right &= not any(row.get("failed") for row in speed_rows)
    seconds = time.perf_counter() - started
    content = {
        "passed": right,
        "seconds": seconds,
        "environment": measured_on,
        "device": str(trained.device),
        "text": trained.text,
        "model": dataclasses.asdict(trained.result.model.config),
        "parameters": sum(p.numel() for p in trained.result.model.parameters()),
        "training": dataclasses.asdict(trained.config),
        "best_validation_loss": trained.result.best_validation_loss,
        "records": trained.result.records,
        "sample": sampled,
        "twin": twin_rows,
        "tuned": tuned,
    }
    write(out, content, PROMPT, parity_rows, speed_rows)
    style, verdict = ("green", "Every check passed") if right else ("red", "A check FAILED")
    console.print(f"\n[bold {style}]{verdict}[/] after {seconds:.0f} s.", end=" ")
    console.print(f"Report: {escape(str(out / 'report.html'))}", soft_wrap=True)
    return 0 if right else 1


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
