"""What the demo shows on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptkernels.cli.console import STYLES

Row = dict[str, Any]


def table(console: Console, columns: dict[str, Callable[[Row], str]], rows: list[Row]) -> None:
    """Print `rows`; a row's `status`, where it has one, colours its last cell."""
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in columns:
        grid.add_column(title, overflow="fold")
    for row in rows:
        style = STYLES.get(row.get("status", ""), "")
        cells = [escape(cell(row)) for cell in columns.values()]
        cells[-1] = f"[{style}]{cells[-1]}[/]" if style else cells[-1]
        grid.add_row(*cells)
    console.print(grid)


def heading(console: Console, title: str, text: str) -> None:
    """Print the title of a part, and in few words what it is about."""
    console.print(f"\n[bold]{escape(title)}[/] [dim]{escape(text)}[/]", soft_wrap=True)


def reasons(reasons: Iterable[str]) -> list[str]:
    """Each reason once, in order, without the empty ones."""
    return [reason for reason in dict.fromkeys(reasons) if reason]


def print_reasons(console: Console, given: Iterable[str]) -> None:
    """Print each reason once."""
    for reason in reasons(given):
        console.print(f"  {escape(reason)}", style="yellow", soft_wrap=True)


def small(value: float | None) -> str:
    """An error as short text, nothing for None."""
    return "" if value is None else f"{value:.2e}"
