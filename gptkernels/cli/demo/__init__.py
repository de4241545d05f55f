"""The command `gptkernels demo`."""

from __future__ import annotations

from pathlib import Path

import click

from gptkernels.cli import options
from gptkernels.cli.console import plain_console
from gptkernels.cli.paths import FOLDER


@click.command("demo")
@click.option(
    "--text", type=options.PATH, help="UTF-8 text to train on.  [default: Python's manual]"
)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("demo-report"),
    show_default=True,
    help="Folder of the report; an earlier one in it is replaced.",
)
@click.option(
    "--minutes",
    type=float,
    default=2.0,
    show_default=True,
    help="Minutes to train. The other parts take about three more.",
)
@options.device
@click.option(
    "--seed",
    type=int,
    default=1337,
    show_default=True,
    help="Seed of the initial weights, the batches and the sample.",
)
def command(text: Path | None, out: Path, minutes: float, device: str, seed: int) -> int:
    """Train a small GPT on real text, sample from it, check it against plain PyTorch, time it, and
    write a report folder.

    Exits with 1 when a check fails, and with 130 when it is interrupted.

    \b
    Examples:
        gptkernels demo
        gptkernels demo --text book.txt --minutes 10
    """
    from gptkernels.cli.demo.run import run

    console = plain_console()
    return run(text=text, out=out, minutes=minutes, device=device, seed=seed, console=console)
