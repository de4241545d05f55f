"""Processes that turn chunks of records into outcomes, in the order of the chunks.

Only a few chunks are on their way at a time, so that memory does not grow with the input. A page
that ends its process (a crash of a library, or the system's memory killer) ends no run: its chunk
is worked on again in a new process, record by record, and the record that ends that one too is
malformed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeAlias

from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.work import Chunk, Outcome, Task, Worker

_AHEAD = 3  # chunks for each process: in work, waiting for it, and waiting to be taken

_Waiting: TypeAlias = deque[tuple[Chunk, Future[list[Outcome]]]]


class Pool:
    """`processes` that work on one task. Use as a context: at its end they end too."""

    def __init__(self, processes: int, task: Task) -> None:
        self._processes, self._task = processes, task
        self._executor = self._started()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def outcomes(self, chunks: Iterable[Chunk]) -> Iterator[list[Outcome]]:
        """Those of each chunk, in order.

        Raises RuntimeError where processes end before they have read anything.
        """
        waiting: _Waiting = deque()
        for chunk in chunks:
            waiting.append((chunk, self._submit(chunk)))
            if len(waiting) >= _AHEAD * self._processes:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: _Waiting) -> list[Outcome]:
        chunk, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:  # by this chunk or by a later one: all were lost
            self._restart()
        outcomes = [self._alone(record) for record in chunk]
        for _ in range(len(waiting)):
            later, _ = waiting.popleft()
            waiting.append((later, self._submit(later)))
        return outcomes

    def _alone(self, record: Record | Malformed) -> Outcome:
        try:
            return self._submit([record]).result()[0]
        except BrokenProcessPool:
            self._restart()
            return Malformed(record.name, "ends the process that reads it")

    def _submit(self, chunk: Chunk) -> Future[list[Outcome]]:
        try:
            with _interrupts_wait():  # where a process is missing, this starts it
                return self._executor.submit(_outcomes, chunk)
        except BrokenProcessPool as error:  # already, by a chunk that was not yet asked for
            broken: Future[list[Outcome]] = Future()
            broken.set_exception(error)
            return broken

    def _started(self) -> ProcessPoolExecutor:
        # Not forked: a thread of this process may hold a lock that its copy would wait for.
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._processes, spawn, _begin, (self._task,))

    def _restart(self) -> None:
        self._executor.shutdown()
        self._executor = self._started()
        try:
            self._submit([]).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "processes: they end before they have read anything; a script that calls prepare "
                'must do so under if __name__ == "__main__"'
            ) from None


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal, and is for this one to handle: those that are
    started in this context never see it."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Worker  # of this process


def _begin(task: Task) -> None:
    """Make a process ready."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(task)


def _end_with_parent() -> None:
    """Of a main process that was killed nobody else would tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcomes(chunk: Chunk) -> list[Outcome]:
    return [_worker.outcome(record) for record in chunk]
