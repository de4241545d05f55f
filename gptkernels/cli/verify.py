"""The command `gptkernels verify`: the parity table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from gptkernels.cli import options
from gptkernels.cli.console import STYLES, plain_console, print_text

_WIDTHS = (16, 44, 6, 8, 9, 9, 9, 0)


@click.command("verify")
@options.impls
@options.ops
@options.dtypes
@options.device
@click.option("--seed", type=int, help="Of the random inputs; default: a new one.")
@click.option("--arch", help="sm80 or sm90: which GPU the emulator stands for.")
@options.json
def command(
    impls: tuple[str, ...],
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    seed: int | None,
    arch: str | None,
    path: Path | None,
) -> int:
    """Compare every operator, forward and gradients, with the formulas in fp64.

    Exits with 1 when any row fails. With --arch sm90, a row says when a kernel made for Hopper did
    not run, and why.
    """
    from gptkernels.bench.results import recorded
    from gptkernels.core.device import choose_device
    from gptkernels.truth import verify as table

    given = {"impls": impls, "ops": ops, "dtypes": [options.dtype(name) for name in dtypes]}
    chosen: dict[str, Any] = {name: values for name, values in given.items() if values}
    seed = table.fresh_seed() if seed is None else seed
    rows = table.run(device=choose_device(device), seed=seed, arch=arch, **chosen)
    counts = dict.fromkeys(STYLES, 0)
    reasons: list[str] = []
    console = plain_console()
    titles = ("op", "case", "impl", "dtype", "direction", "error", "PyTorch's", "status")
    _print_cells(console, titles)
    for row in recorded((row.as_dict() for row in rows), path):
        status = row["status"]
        counts[status] += 1
        note = f": {row['tensor']}" if status == "fail" else ""
        for reason in filter(None, (row["reason"], row["note"])):
            if reason not in reasons:
                reasons.append(reason)
            note += f" ({reasons.index(reason) + 1})"
        cells = [row[name] for name in titles[:5]]
        for name in ("error", "baseline_error"):
            cells.append("" if row[name] is None else f"{row[name]:.2e}")
        _print_cells(console, [*cells, f"{status}{note}"], style=STYLES[status])
    for number, reason in enumerate(reasons, 1):
        print_text(console, f"({number}) {reason}")
    print_text(console, ", ".join(f"{count} {status}" for status, count in counts.items()))
    print_text(console, f"--seed {seed} gives the same inputs again")
    return 1 if counts["fail"] else 0


def _print_cells(console: Console, cells: Sequence[str], style: str | None = None) -> None:
    aligned = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)]
    print_text(console, " ".join(aligned).rstrip(), style)
