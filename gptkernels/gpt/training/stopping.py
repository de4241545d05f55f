"""SIGINT and SIGTERM as a wish to stop, heard between two steps of training."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopping:
    """While entered, the first SIGINT or SIGTERM sets `asked`; a second does what it did before.

    Signals go to the main thread alone: in another one this hears nothing, and changes nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that Python did not set, and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
