"""SIGINT and SIGTERM stop training, between two micro-batches or two batches of a validation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """What was begun is given up, because a signal asked for it."""


class Stopping:
    """In this context the first SIGINT or SIGTERM sets `asked` and calls `said` at once; a second
    one acts as outside it.

    Only the main thread receives signals: in another thread this context does nothing.
    """

    def __init__(self, said: Callable[[], None] | None = None) -> None:
        self.asked = False
        self._said = said
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise Stopped where a signal asked to stop."""
        if self.asked:
            raise Stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        if self._said is not None:
            self._said()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that Python did not set, and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
