"""What the demo shows on the terminal: headings, and what became of the checks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from gptkernels.cli.console import print_text

Row = dict[str, Any]


def heading(console: Console, title: str, text: str) -> None:
    """Print the title of a part, and below it what the part is about."""
    console.print()
    print_text(console, title, "bold")
    print_text(console, text, "dim")


def small(value: float | None) -> str:
    """An error as short text, nothing for None."""
    return "" if value is None else f"{value:.2e}"


def share(row: Row) -> float:
    """The share of its limit that an error reaches; infinite for a failure whose error is no
    number, -1 where nothing was measured."""
    error, limit = row["error"], row["limit"]
    if error is not None and limit and math.isfinite(error):
        return float(error / limit)
    return math.inf if row["status"] == "fail" else -1.0


def of_limit(row: Row) -> str:
    """The share of its limit that an error reaches, nothing where there is none."""
    return f"{share(row):.0%}" if 0 <= share(row) < math.inf else ""


def not_run(rows: Iterable[Row], reason: str) -> list[str]:
    """A line for each reason why rows were not run: how many of which implementation, and the
    reason, which a row has under the name `reason`."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.get(reason):
            of_impl = counts.setdefault(row[reason], {})
            of_impl[row["impl"]] = of_impl.get(row["impl"], 0) + 1
    return [
        f"{', '.join(f'{count} of {impl}' for impl, count in of_impl.items())}: {why}"
        for why, of_impl in counts.items()
    ]
