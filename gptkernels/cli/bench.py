"""The command `gptkernels bench`."""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from gptkernels.cli import options
from gptkernels.cli.console import plain_console, print_text


@click.command("bench")
@options.ops
@options.impls
@options.device
@click.option("--quick", is_flag=True, help="Fewer shapes and shorter measurements.")
@options.json
@click.option("--plot", type=options.PATH, help="Draw the speed-ups as a PNG or SVG file.")
def command(
    ops: tuple[str, ...],
    impls: tuple[str, ...],
    device: str,
    quick: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Time the operators against plain PyTorch on the same inputs, in alternation.

    "spread" is half the distance between the quartiles of a time, as a share of the time.

    "floor" is the least time that this machine's measured rates of memory and arithmetic allow, as
    a share of the time that it took.
    """
    from gptkernels import bench
    from gptkernels.bench import report
    from gptkernels.core.choice import IMPLEMENTATIONS, check_impl
    from gptkernels.core.device import choose_device

    where = choose_device(device)
    for impl in impls:
        check_impl(impl, auto=False)
    if plot is not None:
        report.check_plot(plot)
    timed = [
        bench.rows_of(op, where, impls or IMPLEMENTATIONS, quick) for op in ops or bench.OPERATORS
    ]
    console = plain_console()
    rows = []
    for row in report.recorded(itertools.chain(*timed), path):
        rows.append(row)
        cells = ", ".join(
            value if name == "time" else f"{name} {value}"
            for name, value in report.figures(row).items()
        )
        head = f"{row['op']:<16} {row['shape']:<32} {row['dtype']:<8} {row['direction']:<16}"
        print_text(console, f"{head} {row['impl']:<7} {cells}")
    if plot is not None:
        report.plot(rows, plot)
