"""How commands print."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}
"""The colour of each status."""


class PipeConsole(Console):
    """Lets BrokenPipeError through when nobody reads any more, where rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise BrokenPipeError


def plain_console() -> Console:
    """For lines of any width, which are not folded."""
    return PipeConsole(soft_wrap=True, highlight=False)


def print_text(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is: brackets in it are no markup."""
    console.print(escape(text), style=style)
