"""What a person sees of a corpus being prepared: a bar that moves, or a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_EVERY_S = 5.0


class ProgressBar:
    """A progress bar for `prepare(..., observer=...)`: use as a context, call with the counts.

    On a terminal the bar shows the bytes that were read, documents, tokens and the time that is
    left. Elsewhere (a file, a pipe) a line says so every 5 seconds.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[read]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("preparing", total=1.0, read="", figures="")
        self._last = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, counts: dict[str, int], done: int, total: int) -> None:
        """Show what was counted so far, after `done` of `total` bytes of the input."""
        read = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        figures = f"{counts['documents']:,} documents  {counts['tokens']:,} tokens"
        self._progress.start()  # only now: a run that is refused shows no bar
        self._progress.update(self._task, total=total, completed=done, read=read, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._last >= _EVERY_S:
            self._last = time.monotonic()
            self._console.print(f"{read}  {figures}", highlight=False)
