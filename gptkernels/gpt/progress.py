"""A bar that moves, for whatever takes long."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_RARER = 20  # lines are as far apart as a 20th of the time so far: a long run has hundreds


class Bar:
    """Use as a context; it appears with the first `show`, so that what is refused shows no bar.

    On a terminal it shows what is being done, the share that is done, figures, and the time that is
    left. Elsewhere (a file, a pipe) a line says so every `every_s` seconds, and more rarely the
    longer it takes.
    """

    def __init__(self, console: Console, every_s: float = 5.0) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # may be the name of a file
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1.0, figures="", left="")
        self._figures = ""
        self._every_s, self._last = every_s, time.monotonic()
        self._first: tuple[float, float] | None = None  # when it appeared, and with what share

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def show(
        self, what: str, done: float, figures: str | None = "", left_s: float | None = None
    ) -> None:
        """Show what is being done, how much of the whole is, 0 to 1, and figures; None leaves those
        that stand there. left_s: the seconds that are left; None reckons them by what is done."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        start, before = self._first
        if left_s is None and done > before:
            left_s = (now - start) * (1 - done) / (done - before)
        left = "" if left_s is None or done >= 1 else f"{duration(left_s)} left"
        self._figures = self._figures if figures is None else figures
        self._progress.update(
            self._task, description=what, completed=done, figures=self._figures, left=left
        )
        self._progress.start()
        wait = max(self._every_s, (now - start) / _RARER)
        if not self.console.is_terminal and now - self._last >= wait:
            self._last = now
            parts = (f"{done:4.0%}", what, self._figures, left)
            self.console.print("  ".join(filter(None, parts)), markup=False, highlight=False)

    def leave(self, text: str) -> None:
        """Print a line that stays."""
        self._last = time.monotonic()
        self.console.print(text, markup=False, highlight=False)

    def interject(self, text: str) -> None:
        """Print a line from a signal's handler: above the bar, or to stderr where there is none."""
        # The signal may have come in the middle of another line being printed to the same stream.
        with contextlib.suppress(RuntimeError):
            if self.console.is_terminal:
                self.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """About how long that is, in words: "45 s", "3 min", "2 h 10 min", "4 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{round(seconds / 86400)} days"
