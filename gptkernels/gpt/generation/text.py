"""Tokens to text, one token at a time: whole characters, up to a stop string.

A token may end inside a character, and a stop string may begin inside one token and end inside
another. Text that may still change, or may begin a stop string, is held back. So the pieces that
are given out, joined together, are what decoding all tokens at once gives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from gptkernels.gpt.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"

# The most bytes, and so the most tokens, of a character in UTF-8.
_LONGEST = 4


class TextStream:
    """The text of what follows a prompt, one token after another, up to the first stop string.

    The first stop string is the one that is complete first; of several, the longest. Neither it nor
    anything after it is given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode = tokenizer.decode
        # The last few tokens. The next one decodes the same behind these as behind all: an
        # unfinished character begins in them. GPT-1's decode needs one token before the next, for
        # the space between two words.
        self._window = list(prompt)[-_LONGEST:]
        text = self._decode(self._window)
        # If encoding the prompt's text gives the prompt, its last character is finished. A token
        # that begins the prompt is in its text already.
        if text != _finished(text):
            again = tokenizer.encode(tokenizer.decode(prompt), special=False)
            if again != list(prompt):
                text = _finished(text)
        self._given = len(text)  # how many characters of the window's text were given out
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def fork(self) -> TextStream:
        """A second stream that goes on from here by itself."""
        twin = copy.copy(self)
        twin._window = self._window.copy()
        return twin

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        self._window.append(token)
        new = _finished(self._decode(self._window))[self._given :]
        del self._window[:-_LONGEST]
        self._given = len(_finished(self._decode(self._window)))
        return self._up_to_stop(new)

    def end(self) -> str:
        """The text that was held back, when no token follows."""
        last = "" if self.stopped else self._decode(self._window)[self._given :]
        out = self._up_to_stop(last) + self._held
        self._held = ""
        return out

    def _up_to_stop(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if found:
            end, length = min(found)
            self._held, self.stopped = "", True
            return text[: end + length]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _finished(text: str) -> str:
    """`text` without a last U+FFFD, to which an unfinished character is decoded."""
    return text.removesuffix(_UNFINISHED)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with and goes beyond."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
