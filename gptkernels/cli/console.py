"""How commands print: lines that fit the terminal, and are whole in a file or a pipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}
"""The colour of each status."""


class PipeConsole(Console):
    """Lets BrokenPipeError through when nobody reads any more, where rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise BrokenPipeError


def plain_console() -> Console:
    """For lines that fit already (`folded`, `gptkernels.cli.table`)."""
    return PipeConsole(soft_wrap=True, highlight=False)


def room(console: Console) -> int | None:
    """How many columns a line may have: those of a terminal; None in a file or a pipe, where lines
    are as long as they are."""
    return console.width if console.is_terminal else None


def print_text(console: Console, text: str, style: str | None = None) -> None:
    """Print `text`, folded between words where it is wider than the terminal. Brackets and colons
    in it are no markup."""
    for line in folded(text, room(console)):
        console.print(Text(line, style or ""))


def folded(text: str, width: int | None) -> Iterator[str]:
    """The lines of `text`, those that are wider than `width` columns folded between words, and
    indented from there on: as deep as what stands two spaces or more behind a first word, else by
    four. A word that is wider, such as a path, stays whole."""
    for line in text.split("\n"):
        if width is None or len(line) <= width:
            yield line
            continue
        spaces, name = re.findall(r"^( *)(\S+  +)?", line)[0]
        indent = spaces + (" " * len(name) or "    ")
        yield from textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
