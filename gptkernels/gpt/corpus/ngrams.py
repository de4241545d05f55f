"""8-grams of words, as numbers.

Words are runs of letters and digits, lower-cased, as in the overlap analysis of GPT-2's paper
(Radford et al. 2019, section 4). A word w has a number h(w) of 64 bits, and 8 of them have

    h(w_0) m_0 + ... + h(w_7) m_7    mod 2^64,    m_i odd and fixed.

Unlike Python's hash of a string, it is the same in every process. Two 8-grams that differ have the
same number with a probability of 2^-64, or 2^-58 at worst, where two words have changed places.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from gptkernels.gpt.corpus.documents import Part

LENGTH = 8
_WORD = re.compile(r"[^\W_]+")
_BLOCK = 1 << 16  # words of a text that are held at once
_CACHED = 1 << 20  # words whose numbers are held
_draw = random.Random(0)
_MULTIPLIERS = [_draw.getrandbits(62) | 1 for _ in range(LENGTH)]


def words_of(text: str) -> Iterator[str]:
    """The words of `text`, one after the other."""
    return (found[0] for found in _WORD.finditer(text.lower()))


def ngrams_of(texts: Iterable[Part]) -> Iterator[Tensor]:
    """The numbers of the 8-grams of `texts`, in their order, in pieces of bounded size. They go
    from a part to one that continues it, and never from one text to the next."""
    before: list[str] = []
    for part in texts:
        words = words_of(part.text)
        before = before if part.continues else []
        while block := list(islice(words, _BLOCK)):
            block = before + block
            yield ngrams(block)
            before = block[1 - LENGTH :]


def ngrams(words: Sequence[str]) -> Tensor:
    """The number of the 8-gram that begins at each of the N `words` but the last 7: (N - 7,) int64,
    and none where there are fewer than 8 words."""
    count = max(0, len(words) - LENGTH + 1)
    numbers = torch.tensor([_number(word) for word in words], dtype=torch.int64)
    sums = torch.zeros(count, dtype=torch.int64)
    for place, multiplier in enumerate(_MULTIPLIERS):
        sums += numbers[place : place + count] * multiplier  # int64 wraps around
    return sums


@functools.lru_cache(_CACHED)
def _number(word: str) -> int:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
