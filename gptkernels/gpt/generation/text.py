"""From tokens to text, as they come: characters, and stop strings.

A token may end within a character, and a stop string may begin within one token and end within
another. What may still change or turn out to begin a stop string is held back, so that all that was
given out, put together, is what decoding all tokens at once gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptkernels.gpt.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"

# Bytes of a character of UTF-8, and so tokens, at most.
_LONGEST = 4


class TextStream:
    """The text of what follows a prompt, one token after another, up to the first stop string.

    The first stop string is the one that is complete first, the longest of several; neither it nor
    anything after it is given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode = tokenizer.decode
        # The last of all tokens. What follows is decoded behind them as behind all, even where they
        # begin within a character: an unfinished one begins in them. GPT-1's decode needs one, for
        # the space between two words.
        self._window = list(prompt)[-_LONGEST:]
        text = self._decode(self._window)
        # A prompt that comes back from its text ends in no unfinished character.
        if text != _finished(text) and tokenizer.encode(tokenizer.decode(prompt)) != list(prompt):
            text = _finished(text)
        self._given = len(text)  # characters given out of the window's text
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        self._window.append(token)
        new = _finished(self._decode(self._window))[self._given :]
        del self._window[:-_LONGEST]
        self._given = len(_finished(self._decode(self._window)))
        return self._up_to_stop(new)

    def end(self) -> str:
        """What was held back, once no token follows."""
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
    """`text` without what may be the beginning of a character: an unfinished one is decoded to a
    single U+FFFD, and so may a finished one be."""
    return text.removesuffix(_UNFINISHED)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, but is more than."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
