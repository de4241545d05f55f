"""Lets child processes measure classes, and goes on behind what ends or hangs them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.core.tuned import COMPILED, Entry, Key

WORKER = (sys.executable, "-m", "gptkernels.tuning.worker")
# The longest that one way may take: to compile, to run a few times, to be timed.
PATIENCE_S = 60.0
_COMPILING_PATIENCE_S = 300.0
_MOST_DEATHS = 8  # of children, by one class
_STARTING_S = 60.0  # at least: to import PyTorch
_ENDING_S = 10.0  # a child that has closed its stdout
# Event -> the name and type of what it says.
_EVENTS: dict[str, tuple[str, type] | None] = {
    "trying": ("way", str),
    "in turns": ("seconds", float),
    "entry": ("entry", dict),
    "cannot": ("why", str),
    "done": None,
}


@dataclass
class Outcome:
    """What was found of a class: its entry; or why there is none. `refused`: the ways that may not
    be chosen, and why. `alone`: a process ended while it timed several ways, so each is timed alone
    first."""

    key: Key
    entry: Entry | None = None
    why: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    alone: bool = False


def measure(
    keys: Sequence[Key],
    seconds: float,
    *,
    worker: Sequence[str] = WORKER,
    patience_s: float | None = None,
    trying: Callable[[Key, str], None] = lambda key, way: None,
) -> Generator[Outcome, None, None]:
    """Measures the classes one after the other, and yields what was found of each. After `seconds`
    no further class is begun; those left yield nothing.

    A way that ends the child, or takes longer than `patience_s` (by default a minute, five where it
    is compiled), is refused, and its class measured again without it.
    """
    ends = time.monotonic() + seconds
    left = [Outcome(key) for key in keys]
    deaths = 0
    while left and time.monotonic() < ends:
        child = _Child(worker, left, ends - time.monotonic())
        finished, way, in_turns = 0, "", False
        patience = patience_s or _patience(left[0].key)
        wait = max(patience, _STARTING_S)
        try:
            while (event := child.event(wait))["event"] != "done":
                outcome, wait = left[event["key"]], patience
                in_turns = event["event"] == "in turns"
                way = event["way"] if event["event"] == "trying" else ""
                if way:
                    trying(outcome.key, way)
                elif in_turns:
                    wait += 2 * event["seconds"]
                elif event["event"] != "trying":
                    if event["event"] == "entry":
                        outcome.entry = Entry.from_dict(event["entry"])
                        outcome.refused = dict(outcome.entry.refused)
                    else:
                        outcome.why = event["why"]
                    finished, deaths = event["key"] + 1, 0
                    yield outcome
            return
        except _Died as error:
            left = left[finished:]
            if not left:
                return
            deaths += 1
            if way and deaths < _MOST_DEATHS:
                left[0].refused[way] = f"it {error}"
            elif in_turns and not left[0].alone:
                left[0].alone = True  # then `way` says which it was
            else:
                left[0].why = f"the process that measures {error}"
                yield left.pop(0)
                deaths = 0
        finally:
            child.close()


def _patience(key: Key) -> float:
    return _COMPILING_PATIENCE_S if key.mode == COMPILED else PATIENCE_S


class _Died(Exception):
    """The child ended, or said nothing for too long; the message is what it did."""


class _Child:
    def __init__(self, command: Sequence[str], classes: Sequence[Outcome], seconds: float) -> None:
        self._count = len(classes)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            errors="replace",
            env=_environment(),
            start_new_session=os.name != "nt",
        )
        given = {
            "keys": [outcome.key.as_dict() for outcome in classes],
            "refused": [outcome.refused for outcome in classes],
            "alone": [outcome.alone for outcome in classes],
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.current_device() if torch.cuda.is_initialized() else None,
            "precision": torch.get_float32_matmul_precision(),
        }
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        # One that does not read keeps nobody waiting.
        threading.Thread(target=self._give, args=(given,), daemon=True).start()

    def _give(self, given: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # ValueError: it is closed. OSError: the child has ended, and `event` says how.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def event(self, patience_s: float) -> dict[str, Any]:
        """What the child says next. Raises _Died where it ends before it is done, or hangs."""
        ends = time.monotonic() + patience_s
        while True:
            try:
                left = ends - time.monotonic()
                if left <= 0:  # what lies in the queue may be no event, and more of it may come
                    raise queue.Empty
                line = self._lines.get(timeout=left)
            except queue.Empty:
                raise _Died(f"was not done after {patience_s:.0f} s") from None
            if not line:
                raise _Died(self._ended())
            event = _event(line, self._count)
            if event is not None:
                return event

    def _ended(self) -> str:
        """The last words of a child whose stdout has ended."""
        try:
            code = self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            return "closed its stdout"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}" + (f" ({lines[-1]})" if lines else "")

    def close(self) -> None:
        """Ends the child and all that it started."""
        if self._process.poll() is None:
            if os.name == "nt":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it did not read
                    stream.close()
        self._said.close()


def _event(line: str, classes: int) -> dict[str, Any] | None:
    """What a line says; None where it is no event but what something has printed."""
    try:
        event: dict[str, Any] = json.loads(line)
        kind = event["event"]
        wanted = _EVENTS[kind]
        if kind != "done" and not 0 <= event["key"] < classes:
            return None
        return event if wanted is None or isinstance(event[wanted[0]], wanted[1]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _environment() -> dict[str, str]:
    """Without what would choose or refuse for the child."""
    left_out = ("GPTKERNELS_IMPL", "GPTKERNELS_TUNED_FILE")
    found = {name: value for name, value in os.environ.items() if name not in left_out}
    return found | {"GPTKERNELS_TUNE": "off"}
