"""The command `gptkernels demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gptkernels.cli import options
from gptkernels.cli.console import PipeConsole


@click.command("demo")
@click.option("--text", type=options.PATH, help="UTF-8 text; default: Python's own manual.")
@click.option("--out", type=options.PATH, default=Path("demo-report"), show_default=True)
@click.option("--minutes", type=float, default=2.0, show_default=True, help="Time to train.")
@options.device
@click.option("--seed", type=int, default=1337, show_default=True)
def command(text: Path | None, out: Path, minutes: float, device: str, seed: int) -> int:
    """Train a small GPT on real text, sample from it, check it against plain PyTorch, time it, and
    write a report folder.

    Exits with 1 when a check fails.
    """
    from gptkernels.cli.demo.run import run

    # A file or a pipe has no width of its own, and the customary 80 would fold the tables.
    console = PipeConsole(highlight=False, width=None if sys.stdout.isatty() else 110)
    return run(text=text, out=out, minutes=minutes, device=device, seed=seed, console=console)
