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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.core.tuned import COMPILED, Entry, Key

WORKER = (sys.executable, "-m", "gptkernels.tuning.worker")
# The longest that one way may take: to compile, to run a few times, to be timed.
PATIENCE_S = 60.0
_COMPILING_PATIENCE_S = 300.0
_MOST_DEATHS = 8  # of children, by one class


@dataclass
class Outcome:
    """What was found of a class: its entry; or why there is none. `refused`: the ways that may not
    be chosen, and why."""

    key: Key
    entry: Entry | None = None
    why: str = ""
    refused: dict[str, str] = field(default_factory=dict)


def measure(
    keys: Sequence[Key],
    seconds: float,
    *,
    worker: Sequence[str] = WORKER,
    patience_s: float | None = None,
    trying: Callable[[Key, str], None] = lambda key, way: None,
) -> Iterator[Outcome]:
    """Measures the classes one after the other, and yields what was found of each. After `seconds`
    no further class is begun; those left yield nothing.

    A way that ends the child, or takes longer than `patience_s` (by default a minute, five where it
    is compiled), is refused, and its class measured again without it.
    """
    ends = time.monotonic() + seconds
    left = [Outcome(key) for key in keys]
    deaths = 0
    while left and time.monotonic() < ends:
        child = _Child(worker, [(o.key, o.refused) for o in left], ends - time.monotonic())
        finished, way = 0, ""
        try:
            for event in child.events(patience_s or _patience(left[0].key)):
                outcome = left[event.get("key", 0)] if event["event"] != "done" else left[-1]
                match event["event"]:
                    case "trying":
                        way = event["way"]
                        trying(outcome.key, way)
                    case "entry":
                        outcome.entry = Entry.from_dict(event["entry"])
                        outcome.refused = dict(outcome.entry.refused)
                        finished, way, deaths = event["key"] + 1, "", 0
                        yield outcome
                    case "cannot":
                        outcome.why = event["why"]
                        finished, way, deaths = event["key"] + 1, "", 0
                        yield outcome
                    case "done":
                        return
        except _Died as error:
            left = left[finished:]
            if not left:
                return
            deaths += 1
            if way and deaths < _MOST_DEATHS:
                left[0].refused[way] = str(error)
            else:
                left[0].why = f"the measuring process {str(error).removeprefix('it ')}"
                yield left.pop(0)
                deaths = 0
        finally:
            child.close()


def _patience(key: Key) -> float:
    return _COMPILING_PATIENCE_S if key.mode == COMPILED else PATIENCE_S


class _Died(Exception):
    """The child ended, or said nothing for too long; the message says which of a way."""


class _Child:
    def __init__(
        self, command: Sequence[str], classes: Sequence[tuple[Key, dict[str, str]]], seconds: float
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=_environment(),
            start_new_session=os.name != "nt",
        )
        given = {
            "keys": [key.as_dict() for key, _ in classes],
            "refused": [refused for _, refused in classes],
            "seconds": seconds,
            "threads": torch.get_num_threads(),
        }
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `events` says how
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def events(self, patience_s: float) -> Iterator[dict[str, Any]]:
        """What the child says. Raises _Died where it ends before it is done, or hangs."""
        while True:
            try:
                line = self._lines.get(timeout=patience_s)
            except queue.Empty:
                raise _Died(f"it was not done after {patience_s:.0f} s") from None
            if not line:
                raise _Died(self._ended())
            event = json.loads(line)
            yield event
            if event["event"] == "done":
                return

    def _ended(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"it ended the process with {signal.Signals(-code).name}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"it ended the process with exit code {code}" + (f" ({lines[-1]})" if lines else "")

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


def _environment() -> dict[str, str]:
    """Without what would choose or refuse for the child."""
    left_out = ("GPTKERNELS_IMPL", "GPTKERNELS_TUNED_FILE")
    found = {name: value for name, value in os.environ.items() if name not in left_out}
    return found | {"GPTKERNELS_TUNE": "off"}
