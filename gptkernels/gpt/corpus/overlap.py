"""How much of an evaluation's texts is in the training texts: the share of their 8-grams.

As in GPT-2's paper (Radford et al. 2019, section 4), the 8-grams of the training texts go into a
Bloom filter, which says of an 8-gram that it was not added, or that it most likely was. Where a
filter for all of them would take too much memory, one is filled several times, each time with the
next part of the training texts, and asked for what has not been found yet. So the training texts
are read once, and the memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from gptkernels.core.optional import optional
from gptkernels.gpt.corpus.documents import Part
from gptkernels.gpt.corpus.ngrams import LENGTH, ngrams, ngrams_of, words_of

FALSE_POSITIVES = 1e-8
MEMORY = 1 << 30
_MISSING = "looking for overlap needs the package rbloom: pip install 'gptkernels[data]'"
_SHOWN = 16  # words


@dataclass(frozen=True)
class Overlap:
    """What of an evaluation is in the training texts.

    Fields:
        name: the evaluation's.
        ngrams: its 8-grams, each as often as it occurs.
        found: how many of them are in the training texts.
        longest: the words of its longest stretch that is there, as far as 8-grams tell.
        example: how that stretch begins, or "".
    """

    name: str
    ngrams: int
    found: int
    longest: int
    example: str

    @property
    def share(self) -> float:
        """Of 8-grams, from 0 to 1."""
        return self.found / self.ngrams


def overlap(
    texts: Iterable[Part],
    words: int,
    evaluations: Mapping[str, Sequence[str]],
    *,
    memory: int = MEMORY,
    false_positives: float = FALSE_POSITIVES,
) -> list[Overlap]:
    """What of each of `evaluations`, name -> texts, is in the training `texts`.

    Args:
        texts: no 8-gram goes from one to the next, but into parts that continue it.
        words: no fewer than there are in `texts`, all together.
        memory: bytes of the filter, at most. What else is held is in proportion to the evaluations.
        false_positives: the share, at most, of 8-grams in no training text that count as found.

    Raises ValueError for an evaluation none of whose texts has 8 words, and ImportError where
    rbloom is missing.
    """
    split = {name: [list(words_of(text)) for text in given] for name, given in evaluations.items()}
    sought: set[int] = set()
    for name, lists in split.items():
        own = {number for each in lists for number in ngrams(each).tolist()}
        if not own:
            raise ValueError(f"evaluations: {name} has no text of at least {LENGTH} words")
        sought |= own
    found = _found(texts, sought, *_size(words, memory, false_positives))
    return [_overlap(name, lists, found) for name, lists in split.items()]


def _size(words: int, memory: int, false_positives: float) -> tuple[int, float]:
    """How many 8-grams fit into a filter of `memory` bytes, and its rate of false positives, which
    is so low that all filters together keep to `false_positives`."""
    filters = 1
    while True:
        rate = false_positives / filters
        fit = int(8 * memory * math.log(2) ** 2 / -math.log(rate))  # Bloom 1970
        if fit < 1:
            raise ValueError(f"memory must be at least {LENGTH} bytes, got {memory}")
        if words <= fit * filters:
            return max(1, min(fit, words)), rate
        filters = -(-words // fit)


def _found(texts: Iterable[Part], sought: set[int], size: int, rate: float) -> set[int]:
    """Those of `sought` that are 8-grams of `texts`, by filters that hold `size` of them."""
    # rbloom takes Python's hash of what is added; that of an int is the int mod 2^61 - 1.
    bloom = optional("rbloom", _MISSING).Bloom(size, rate)
    found: set[int] = set()
    room = size
    for part in _split(texts, size):
        if len(part) > room:
            found.update(filter(bloom.__contains__, sought - found))
            bloom.clear()
            room = size
        bloom.update(part)
        room -= len(part)
    found.update(filter(bloom.__contains__, sought - found))
    return found


def _split(texts: Iterable[Part], most: int) -> Iterator[list[int]]:
    for numbers in ngrams_of(texts):
        yield from (part.tolist() for part in numbers.split(most))


def _overlap(name: str, lists: Sequence[Sequence[str]], found: set[int]) -> Overlap:
    count = hits = longest = 0
    example = ""
    for words in lists:
        numbers = ngrams(words).tolist()
        count += len(numbers)
        start = 0
        for there, run in groupby(number in found for number in numbers):
            length = len(list(run))
            if there:
                hits += length
                if length + LENGTH - 1 > longest:
                    longest = length + LENGTH - 1
                    example = " ".join(words[start : start + min(longest, _SHOWN)])
            start += length
    return Overlap(name, count, hits, longest, example)
