"""What `gptkernels generate` reads and prints: prompts line by line, results in their order."""

from __future__ import annotations

import codecs
import json
import os
import queue
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gptkernels.gpt.generation.engine import Event, Request
    from gptkernels.gpt.tokenizer import Tokenizer

# How many lines are read before they are needed.
_AHEAD = 64


class Lines:
    """The lines of standard input, read by a thread of its own while texts are being continued."""

    def __init__(self) -> None:
        if sys.stdin is None:
            raise ValueError("prompts are missing: give --prompt, or lines on standard input")
        if sys.stdin.isatty():
            click.echo("Every line is a prompt; end with Ctrl-D.", err=True)
        self.ended = False
        self._queue: queue.Queue[str | OSError | None] = queue.Queue(_AHEAD)
        threading.Thread(target=self._read, args=(sys.stdin.fileno(),), daemon=True).start()

    def take(self, wait: bool) -> str | None:
        """The next line, without its end; None if there is none (yet, unless `wait`)."""
        try:
            line = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(line, OSError):
            raise line
        self.ended = line is None
        return line

    def _read(self, file: int) -> None:
        # Not with sys.stdin: a thread that waits for a line would hold its lock when Python exits.
        rest, mark = b"", codecs.BOM_UTF8  # some editors and shells put it first
        try:
            while part := os.read(file, 2**16):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._put(line.removeprefix(mark))
                    mark = b""
        except OSError as error:
            self._queue.put(error)
        if rest := rest.removeprefix(mark):
            self._put(rest)
        self._queue.put(None)

    def _put(self, line: bytes) -> None:
        # Bytes that are not UTF-8 become lone surrogates, which tokenizers refuse in a sentence.
        self._queue.put(line.removesuffix(b"\r").decode("utf-8", errors="surrogateescape"))


class Printer:
    """Prints results in the order of their prompts, whatever the order in which they come.

    As text: the first that is not finished as it comes, those behind it once it is their turn. As
    JSON: an object a line, when it is finished and its turn has come.
    """

    def __init__(self, tokenizer: Tokenizer, as_json: bool, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._as_json, self._logprobs = as_json, logprobs
        self._turns: deque[tuple[int, int, str, Request]] = deque()
        self._events: dict[tuple[int, int], list[Event]] = {}
        self._printed = 0  # events of the result whose turn it is
        self._first = True

    def expect(self, number: int, prompt: str, request: Request) -> None:
        """Results of a request will come."""
        for sample in range(request.samples):
            self._turns.append((number, sample, prompt, request))
            self._events[number, sample] = []

    def take(self, event: Event) -> None:
        """One of them."""
        self._events[event.request, event.sample].append(event)
        while self._turns and self._print(*self._turns[0]):
            number, sample, _, _ = self._turns.popleft()
            del self._events[number, sample]
            self._printed = 0

    def _print(self, number: int, sample: int, prompt: str, request: Request) -> bool:
        """Print what there is of a result; whether that was all."""
        events = self._events[number, sample]
        if not events:
            return False
        finished = events[-1].finish_reason is not None
        if self._as_json:
            if finished:
                click.echo(json.dumps(self._object(events, prompt, request)))
            return finished
        if not self._printed:
            click.echo("" if self._first else "---\n", nl=False)
            click.echo(self._tokenizer.decode(request.tokens), nl=False)
            self._first = False
        click.echo("".join(event.text for event in events[self._printed :]), nl=finished)
        self._printed = len(events)
        return finished

    def _object(self, events: list[Event], prompt: str, request: Request) -> dict[str, Any]:
        chosen = [event for event in events if event.token is not None]
        result: dict[str, Any] = {
            "request": events[0].request,
            "sample": events[0].sample,
            "seed": request.seed,
            "prompt": prompt,
            "text": "".join(event.text for event in events),
            "tokens": [event.token for event in chosen],
            "finish_reason": events[-1].finish_reason,
        }
        if self._logprobs:
            result["logprobs"] = [event.logprob for event in chosen]
        return result
