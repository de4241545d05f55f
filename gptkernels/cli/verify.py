"""The command `gptkernels verify`: the parity table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gptkernels.cli import named, options
from gptkernels.cli.console import STYLES, plain_console, print_text, room
from gptkernels.cli.table import Column, Layout

Row = dict[str, Any]
# Rows are printed as they are measured, so the widths are those of the longest cells there can be.
_COLUMNS = (
    Column("impl", 6),
    Column("dtype", 8),
    Column("direction", 9),
    Column("error", 8, right=True),
    Column("PyTorch's", 8, right=True, lost=2),
    Column("limit", 8, right=True, lost=1),
    Column("", 8),
)


@click.command("verify")
@options.impls
@options.ops()
@options.dtypes()
@options.device
@click.option("--seed", type=int, help="Seed of the random inputs.  [default: a new one]")
@click.option(
    "--arch",
    metavar="[sm80|sm90]",
    help="GPU that the emulator stands for, an A100 (sm80) or a Hopper GPU (sm90); with --impl "
    "cuda alone.",
)
@named.allow_skip
@options.json
def command(
    impls: tuple[str, ...],
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    seed: int | None,
    arch: str | None,
    allow_skip: bool,
    path: Path | None,
) -> int:
    """Compare every operator, forward and gradients, with the formulas in fp64.

    A row passes when its error, the largest distance to the result in fp64, is within the limit,
    which follows from the error of PyTorch's own operators on the same inputs. With --arch sm90, a
    row says when a kernel made for Hopper did not run, and why.

    What cannot run on this machine is skipped. But of each combination of what --impl, --op and
    --dtype name, at least one row has to run. The exit code is 1 where one does not, and where a
    row fails.

    \b
    Examples:
        gptkernels verify
        gptkernels verify --impl cpu --op attention --dtype bf16
        TRITON_INTERPRET=1 gptkernels verify --impl triton
        GPTKERNELS_EMULATE=1 gptkernels verify --impl cuda --arch sm90
    """
    from gptkernels.bench.results import recorded
    from gptkernels.core.device import choose_device
    from gptkernels.truth import verify as table

    given = {"impls": impls, "ops": ops, "dtypes": map(options.dtype, dtypes)}
    once = {name: tuple(dict.fromkeys(values)) for name, values in given.items()}
    chosen: dict[str, Any] = {name: values for name, values in once.items() if values}
    seed = table.fresh_seed() if seed is None else seed
    asked = named.names(impls, ops, dtypes)
    measured = table.run(device=choose_device(device), seed=seed, arch=arch, **chosen)
    rows = _show(recorded((row.as_dict() for row in measured), path))
    console = plain_console()
    counts = {status: sum(row["status"] == status for row in rows) for status in STYLES}
    print_text(console, ", ".join(f"{count} {status}" for status, count in counts.items()))
    for line in named.grouped((row for row in rows if row["status"] == "skipped"), "reason"):
        print_text(console, f"  {line}")
    print_text(console, f"--seed {seed} gives the same inputs again")
    absent = () if allow_skip else tuple(named.missing(asked, rows, _skipped))
    for line in absent:
        print_text(console, f"{line} (--allow-skip lets it pass)", STYLES["fail"])
    return 1 if counts["fail"] or absent else 0


def _skipped(row: Row) -> str | None:
    return row["reason"] if row["status"] == "skipped" else None


def _show(rows: Iterator[Row]) -> list[Row]:
    """Print the rows that run as they come, under a line for each case; return all rows."""
    console = plain_console()
    layout = Layout(_COLUMNS, room(console), indent="  ")
    seen: list[Row] = []
    notes: list[str] = []
    case = None
    for row in rows:
        seen.append(row)
        status = row["status"]
        if status == "skipped":
            continue
        if case is None:
            for line in layout.head():
                print_text(console, line, "bold")
        if case != (case := f"{row['op']}: {row['case']}"):
            print_text(console, case)
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        note = f" ({notes.index(row['note']) + 1})" if row["note"] else ""
        numbers = (_number(row[name]) for name in ("error", "baseline_error", "limit"))
        cells = (row["impl"], row["dtype"], row["direction"], *numbers, f"{status}{note}")
        for line in layout.lines(cells):
            print_text(console, line, STYLES[status])
        if status == "fail":
            print_text(console, f"    {_why(row)}", STYLES[status])
    for number, note in enumerate(notes, 1):
        print_text(console, f"({number}) {note}")
    return seen


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _why(row: Row) -> str:
    """Why a row failed: how it ended, or whose error is too large."""
    if row["error"] is None:
        return str(row["reason"])
    return f"{row['tensor']}: the error {_number(row['error'])} is above {_number(row['limit'])}"
