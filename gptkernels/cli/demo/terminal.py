"""What the demo shows on the terminal: headings, errors and their shares of the limits."""

from __future__ import annotations

import math
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
