"""A long text in pieces, so that what is made of it (words, ids) is never all in memory.

A tokenizer needs 150 bytes and more for each character. Between two letters or digits with one
space between them every tokenizer here divides a text anyway, so pieces that are cut there have the
ids that the whole has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = 1 << 16  # characters, at least
_LONGEST = 16 * PIECE  # where there is no place to cut: it would be one word of a million letters
_PLACE = re.compile(r"(?<=\w) (?=\w)")


def pieces(text: str) -> Iterator[str]:
    """Joined, they are `text`. Each but the first begins with a space, unless a word was cut."""
    start = 0
    while len(text) - start > PIECE:
        found = _PLACE.search(text, start + PIECE, start + _LONGEST)
        end = found.start() if found else start + _LONGEST
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
