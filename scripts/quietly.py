"""Runs a command behind one line of progress. All that the command prints goes into a log.

    python scripts/quietly.py LOG COMMAND...

On a terminal the line shows the time and what the command printed last; elsewhere a new line comes
every twenty seconds. Where the command fails, the end of the log is shown.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

_SPINNER = "|/-\\"
_SPIN, _REPORT = 0.2, 20.0  # seconds between two lines, on a terminal and elsewhere
_WIDTH = 120  # of a line elsewhere
_TAIL = 25  # lines of the log that a failure shows


def main(arguments: Sequence[str]) -> int:
    """Returns the command's exit code."""
    log, *command = arguments
    code = run(command, Path(log))
    if code:
        show_end(Path(log))
    return code


def run(command: Sequence[str], log: Path) -> int:
    """Runs the command, appends what it prints to the log, and returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        # What pip and compilers print is in the locale's encoding, or in none.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        output = _Output(child, file)
        output.start()
        try:
            _report(child, output, started)
        finally:  # Ctrl-C reaches the child too, and it may have something to undo
            child.wait()
            output.join()
    seconds = time.monotonic() - started
    _line(f"{'done' if child.returncode == 0 else 'failed'} after {_written(seconds)}", last=True)
    return child.returncode


def show_end(log: Path) -> None:
    """Prints the last lines of a log, and its name, on stderr."""
    lines = log.read_text(encoding="utf-8").splitlines()
    print(*lines[-_TAIL:], f"All of it is in {log}", sep="\n", file=sys.stderr)


class _Output(threading.Thread):
    """Copies what a child prints into a file, and knows the last line of it."""

    def __init__(self, child: subprocess.Popen[str], file: TextIO) -> None:
        super().__init__()
        self.child, self.file, self.latest = child, file, ""

    def run(self) -> None:
        assert self.child.stdout is not None
        for text in self.child.stdout:
            print(text, end="", file=self.file, flush=True)
            self.latest = text.strip() or self.latest


def _report(child: subprocess.Popen[str], output: _Output, started: float) -> None:
    """Shows progress until the child has ended."""
    for turn in itertools.count():
        try:
            child.wait(_SPIN if _on_terminal() else _REPORT)
            return
        except subprocess.TimeoutExpired:
            passed = _written(time.monotonic() - started)
            mark = f"{_SPINNER[turn % len(_SPINNER)]} " if _on_terminal() else ""
            _line(f"{mark}{passed}: {output.latest}", last=False)


def _line(text: str, *, last: bool) -> None:
    """Prints a line, on a terminal over the one before."""
    if _on_terminal():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{f'  {text}'[:width]}\033[K", end="\n" if last else "", flush=True)
    else:
        print(f"  {text}"[:_WIDTH], flush=True)


def _on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _written(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print()
        sys.exit(130)
