"""Processes that turn chunks of records into outcomes, in the order of the chunks.

Chunk i goes to process i % n, by a pipe of its own, and its outcomes come back by that pipe. So
nothing is shared that a process could take along when it dies, and the order needs no book-keeping.
Only a few chunks are on their way at a time, so that memory does not grow with the input.

A page that ends its process (a crash of a library, or the system's memory killer) ends no run: its
chunk is worked on again in a new process, record by record, and the record that ends that one too
is malformed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import TypeAlias

from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.work import Chunk, Outcome, Task, Worker

_AHEAD = 3  # chunks for each process: in work, waiting for it, and waiting to be taken

_Waiting: TypeAlias = deque[tuple[int, Chunk]]


class Pool:
    """Processes, `count` of them, that work on one task. Use as a context: at its end they end, in
    the middle of whatever they do."""

    def __init__(self, count: int, task: Task) -> None:
        self._task = task
        self._processes = [_Process(task) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.end()

    def outcomes(self, chunks: Iterable[Chunk]) -> Iterator[list[Outcome]]:
        """Those of each chunk, in order.

        Raises RuntimeError where processes end before they have read anything, and ImportError for
        a package that is missing.
        """
        count = len(self._processes)
        waiting: _Waiting = deque()
        for number, chunk in enumerate(chunks):
            place = number % count
            self._processes[place].send(chunk)
            waiting.append((place, chunk))
            if len(waiting) == _AHEAD * count:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: _Waiting) -> list[Outcome]:
        place, chunk = waiting.popleft()
        try:
            return self._processes[place].receive()
        except EOFError:
            self._replace(place)
        outcomes = [self._alone(place, record) for record in chunk]
        for other, later in waiting:  # what the dead process was yet to work on
            if other == place:
                self._processes[place].send(later)
        return outcomes

    def _alone(self, place: int, record: Record | Malformed) -> Outcome:
        self._processes[place].send([record])
        try:
            return self._processes[place].receive()[0]
        except EOFError:
            self._replace(place)
            return Malformed(record.name, "ends the process that reads it")

    def _replace(self, place: int) -> None:
        self._processes[place].end()
        self._processes[place] = _Process(self._task)


class _Process:
    """One process, and this end of its pipe."""

    def __init__(self, task: Task) -> None:
        # Not forked: a thread of this process may hold a lock that its copy would wait for.
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, task), daemon=True)
        with _interrupts_wait():
            self._process.start()
        theirs.close()
        self._began = False

    def send(self, chunk: Chunk) -> None:
        with contextlib.suppress(OSError):  # it is dead: `receive` tells
            self._pipe.send(chunk)

    def receive(self) -> list[Outcome]:
        """The outcomes of the first chunk that was sent and not yet received. Raises EOFError where
        the process is dead, and ImportError for a package that it lacks."""
        if not self._began:
            try:
                self._pipe.recv()
            except (EOFError, OSError):
                raise RuntimeError(
                    "processes: they end before they have read anything; a script that calls "
                    'prepare must do so under if __name__ == "__main__"'
                ) from None
            self._began = True
        try:
            outcomes = self._pipe.recv()
        except OSError:
            raise EOFError from None
        if isinstance(outcomes, ImportError):
            raise outcomes
        return outcomes

    def end(self) -> None:
        """At once, whatever it does: it shares nothing that it could leave broken."""
        self._process.kill()
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, task: Task) -> None:
    """What a process does, until it is killed or the main process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows nothing else keeps it away
    worker = Worker(task)
    # Received in a thread: while this one waits for the main process to take outcomes, that one may
    # be waiting for somebody to take a chunk.
    chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    with contextlib.suppress(ConnectionError):
        pipe.send("began")
        threading.Thread(target=_receive, args=(pipe, chunks), daemon=True).start()
        while True:
            pipe.send(_outcomes(worker, chunks.get()))


def _outcomes(worker: Worker, chunk: Chunk) -> list[Outcome] | ImportError:
    try:
        return [worker.outcome(record) for record in chunk]
    except ImportError as error:
        return error


def _receive(pipe: Connection, chunks: queue.SimpleQueue[Chunk]) -> None:
    try:
        while True:
            chunks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal, and is for this one to handle: those that are
    started in this context never see it."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # else it would begin in this context, and let Ctrl-C in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
