"""Tables that fit the terminal, the one way in which commands print them.

Columns that find no room are lost, those of least value first, so that no line is wider than the
terminal. No cell is cut, and none is broken: where one of the first column has no room beside the
others, it stands on a line of its own, above them. In a file or a pipe all columns are there.

`print_table` prints rows that are all known. For rows that come one by one, `Layout` fixes the
columns beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console

from gptkernels.cli.console import print_text, room


@dataclass(frozen=True)
class Column:
    """One of a table.

    width: at least so many characters; a `Layout` has to be told that of the widest cell.
    right: whether cells are aligned to the right, as numbers are.
    lost: the order in which narrow terminals lose columns, 1 first; 0: never.
    """

    title: str
    width: int = 0
    right: bool = False
    lost: int = 0


class Layout:
    """The columns of a table as far as a width of `room` has space for them (None: all), each as
    wide as it says or as its title is, with two spaces between. `indent` stands before each line.
    """

    def __init__(self, columns: Sequence[Column], room: int | None, indent: str = "") -> None:
        self._columns = columns
        self._widths = [max(column.width, cell_len(column.title)) for column in columns]
        self._shown = list(range(len(columns)))
        self._indent = indent
        if room is not None:
            self._fit(room)

    def _fit(self, room: int) -> None:
        may_go = sorted((c.lost, place) for place, c in enumerate(self._columns) if c.lost)
        for _, place in may_go:
            if self._wide() <= room:
                return
            self._shown.remove(place)
        first = self._shown[0]
        rest = self._wide() - self._widths[first]
        self._widths[first] = min(self._widths[first], max(room - rest, 0))

    def _wide(self) -> int:
        gaps = 2 * (len(self._shown) - 1)
        return cell_len(self._indent) + gaps + sum(self._widths[place] for place in self._shown)

    def head(self) -> Iterator[str]:
        """The line of titles; none where no column has one."""
        titles = [column.title for column in self._columns]
        if any(titles):
            yield from self.lines(titles)

    def lines(self, cells: Sequence[str]) -> Iterator[str]:
        """A row: a line, or two where the first cell is wider than its column."""
        first, *rest = self._shown
        beside = cells[first]
        if rest and cell_len(beside) > self._widths[first]:
            yield f"{self._indent}{beside}"
            beside = ""
        found = [self._aligned(first, beside), *(self._aligned(n, cells[n]) for n in rest)]
        yield (self._indent + "  ".join(found)).rstrip()

    def _aligned(self, place: int, cell: str) -> str:
        spaces = " " * (self._widths[place] - cell_len(cell))
        return spaces + cell if self._columns[place].right else cell + spaces


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int | None, indent: str = ""
) -> Layout:
    """The layout for `rows` that are all known: each column is as wide as its widest cell."""
    widths = [
        max([column.width, *(cell_len(cells[place]) for cells in rows)])
        for place, column in enumerate(columns)
    ]
    wide = [replace(column, width=w) for column, w in zip(columns, widths, strict=True)]
    return Layout(wide, room, indent)


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    styles: Iterable[str | None] = (),
    indent: str = "",
) -> None:
    """Print rows that are all known, as wide as the terminal lets them; `styles` are the rows'."""
    layout = fitted(columns, rows, room(console), indent)
    for line in layout.head():
        print_text(console, line, "bold")
    for cells, style in itertools.zip_longest(rows, styles):
        for line in layout.lines(cells):
            print_text(console, line, style)
