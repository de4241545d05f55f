"""Tables and sentences fit the terminal, and lose nothing that they were not told to lose."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from rich.cells import cell_len
from rich.console import Console

from gptkernels.cli.console import folded, print_text
from gptkernels.cli.table import Column, Layout, fitted, print_table

COLUMNS = (
    Column("text"),
    Column("tokens", right=True, lost=1),
    Column("bits/byte", right=True),
    Column("status", lost=2),
)
ROWS = (
    ("a.txt", "1,234,567", "0.98", "pass"),
    ("a much longer name.txt", "12", "10.25", "fail"),
)


def printed(width: int, *, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=width, no_color=True, _environ={}, soft_wrap=True
    )
    print_table(console, COLUMNS, ROWS, styles=("green", "bold red"))
    return [line.split("\x1b[0m")[0].split("m", 1)[-1] if terminal else line
            for line in file.getvalue().splitlines()]  # fmt: skip


def test_a_wide_table_has_every_cell() -> None:
    wide = [
        "text                       tokens  bits/byte  status",
        "a.txt                   1,234,567       0.98  pass",
        "a much longer name.txt         12      10.25  fail",
    ]
    assert printed(60) == wide
    assert printed(20, terminal=False) == wide  # a file or a pipe has no limit


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (52, ["text", "tokens", "bits/byte", "status"]),
        (51, ["text", "bits/byte", "status"]),
        (41, ["text", "bits/byte", "status"]),
        (40, ["text", "bits/byte"]),
        (24, ["text", "bits/byte"]),
    ],
)
def test_a_narrow_one_loses_columns_in_order_and_breaks_no_cell(
    width: int, titles: list[str]
) -> None:
    lines = printed(width)
    assert lines[0].split() == titles
    assert max(map(len, lines)) <= max(width, len(ROWS[1][0]))
    said = " ".join(lines)
    for row in ROWS:
        for column, cell in zip(COLUMNS, row, strict=True):
            assert (cell in said) == (column.title in titles)


def test_a_first_cell_without_room_stands_above_the_others() -> None:
    layout = fitted(COLUMNS, ROWS, 20, indent=" ")
    assert list(layout.lines(ROWS[0])) == [" a.txt          0.98"]
    assert list(layout.lines(ROWS[1])) == [" a much longer name.txt", "               10.25"]


def test_characters_of_two_columns_are_aligned() -> None:
    layout = fitted((Column("name"), Column("n")), [("語彙", "1"), ("abcdef", "2")], None)
    lines = [next(layout.lines(row)) for row in (("語彙", "1"), ("abcdef", "2"))]
    assert [cell_len(line) for line in lines] == [9, 9]


def test_rows_that_come_one_by_one_are_as_wide_as_was_said() -> None:
    layout = Layout((Column("op", 6), Column("error", 8, right=True)), 80, indent="  ")
    assert [*layout.head(), *layout.lines(("mlp", "1.0e-3"))] == [
        "  op         error",
        "  mlp       1.0e-3",
    ]
    assert list(Layout((Column(""), Column("")), None).head()) == []


def test_sentences_are_folded_between_words() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=20, no_color=True, soft_wrap=True)
    print_text(console, "  [b] is no :cat: but folded at /a/path/that/is/too/long words")
    assert file.getvalue().splitlines() == [
        "  [b] is no :cat:",
        "      but folded at",
        "      /a/path/that/is/too/long",
        "      words",
    ]
    assert list(folded("  triton  is not here", 20)) == ["  triton  is not", "          here"]
    print_text(Console(file=(file := io.StringIO()), width=20, soft_wrap=True), "a b " * 20)
    assert file.getvalue() == "a b " * 20 + "\n"
