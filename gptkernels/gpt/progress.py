"""A bar that moves, for whatever takes long."""

from __future__ import annotations

import math
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Use as a context; it appears with the first `show`, so that what is refused shows no bar.

    On a terminal it shows what is being done, the share that is done, figures, and the time that is
    left. Elsewhere (a file, a pipe) a line says so every `every_s` seconds.
    """

    def __init__(self, console: Console, every_s: float = math.inf) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1.0, figures="")
        self._every_s, self._last = every_s, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def show(self, what: str, done: float, figures: str | None = "") -> None:
        """Show what is being done, how much of the whole is, 0 to 1, and figures; None leaves those
        that stand there."""
        self._progress.start()
        self._progress.update(self._task, description=what, completed=done)
        if figures is not None:
            self._progress.update(self._task, figures=figures)
        if not self.console.is_terminal and time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self.console.print(f"{done:4.0%}  {what}  {figures or ''}".rstrip(), highlight=False)
