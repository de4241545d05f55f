"""How well a model predicts a text that is longer than its context, by a sliding window.

    tokens    t_0 | t_1 ... t_N      t_0 begins a text (`beginning`), or is its first token
    window    the model reads up to block_size tokens, and predicts the last `stride` of those that
              follow them. The first window predicts all; the last one is as full as the others

Each of t_1 ... t_N is predicted exactly once, behind at least block_size - stride tokens once there
are so many. stride = block_size: the windows do not overlap, and the model reads each token once; a
smaller stride gives more context and costs block_size / stride times as much. These are the windows
of lm-eval's get_rolling_token_windows with context_len = block_size - stride + 1.

The text may have been changed in a way that can be undone (detokenizers.py). Its probability is
then that of the original, whose words and bytes count.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 3.1; Press et
al., "Shortformer: Better Language Modeling Using Shorter Inputs", 2021, section 2; Hugging Face,
"Perplexity of fixed-length models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gptkernels.core.checks import check_count
from gptkernels.gpt.evaluation.likelihood import Question, Scorer
from gptkernels.gpt.tokenizer import Tokenizer, beginning


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of a text. The sum of two is that of both texts together.

    Fields:
        nats: the negative log-probability of its predicted tokens.
        tokens: how many were predicted.
        bytes: of its UTF-8.
        words: runs of characters that are no white space. lm-eval counts the same in a text that
            neither begins nor ends with white space, and one more for each end that has some.
            `perplexity` can count the ends of lines as words too.
        unpredicted: how many tokens were context alone: the first one of a text where the
            tokenizer has no end of text to predict it from. Bytes and words include it.

    Perplexities are infinite past the largest float, and NaN where there is nothing to count.
    """

    nats: float
    tokens: int
    bytes: int
    words: int
    unpredicted: int = 0

    @property
    def per_token(self) -> float:
        """e^(nats / tokens); models compare by it only with the same tokenizer."""
        return exponential(_each(self.nats, self.tokens))

    @property
    def per_word(self) -> float:
        """e^(nats / words). Papers report it for WikiText and the Penn Treebank, where the end of
        a line is a word."""
        return exponential(_each(self.nats, self.words))

    @property
    def bits_per_token(self) -> float:
        """nats / (tokens ln 2)."""
        return _each(self.nats / math.log(2), self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """nats / (bytes ln 2), what papers report for enwik8 and the Pile. Models compare by it
        with any tokenizer that keeps the text as it is."""
        return _each(self.nats / math.log(2), self.bytes)

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
            self.unpredicted + other.unpredicted,
        )


def perplexity(
    scorer: Scorer,
    tokenizer: Tokenizer,
    text: str,
    *,
    block_size: int,
    stride: int,
    original: str | None = None,
    line_ends: bool = False,
    observer: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of `text` by the scorer's model.

    block_size: tokens that a window reads, at most the model's own. stride: how many tokens each
    window but the first predicts, 1...block_size. original: the text whose words and bytes count,
    where that is not `text`. line_ends: whether each end of a line in it is a word too, <eos>, as
    papers count them: the 241,211 words and 4,358 lines of WikiText-2's test part are its 245,569
    tokens (Merity et al., "Pointer Sentinel Mixture Models", 2016, table 1). observer: is told,
    after each window, how many tokens were predicted, and of how many.

    Raises TypeError and ValueError for a number out of range, ValueError for a text without a token
    to predict, and whatever the tokenizer and the scorer raise.
    """
    if check_count("stride", stride) > check_count("block_size", block_size):
        raise ValueError(f"stride must be at most block_size={block_size}, got {stride}")
    tokens = tokenizer.encode(text, special=False)
    start = beginning(tokenizer)
    before = [] if start is None else [start]
    if len(before) + len(tokens) < 2:
        wanted = "one token" if before else "two tokens, as its tokenizer has no end of text"
        raise ValueError(f"a text must have at least {wanted}, got {len(tokens)}")
    total = len(before) + len(tokens) - 1
    nats, predicted = 0.0, 0
    for (likelihood,) in scorer.score(_windows(before + tokens, block_size, stride)):
        nats -= likelihood.total
        predicted += likelihood.tokens
        if observer is not None:
            observer(predicted, total)
    counted = text if original is None else original
    return Perplexity(
        nats,
        predicted,
        bytes=len(counted.encode()),
        words=len(counted.split()) + line_ends * counted.count("\n"),
        unpredicted=len(tokens) - predicted,
    )


def exponential(nats: float) -> float:
    """e^nats, infinite where that is past the largest float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _windows(tokens: Sequence[int], block_size: int, stride: int) -> Iterator[Question]:
    """All tokens but the first, each in the candidate of one question."""
    last = end = 0
    while end < len(tokens) - 1:
        last, end = end, min(len(tokens) - 1, end + (stride if end else block_size))
        read = tuple(tokens[max(0, end - block_size) : end + 1])
        predicted = end - last
        yield Question(read[:-predicted], (read[-predicted:],))


def _each(amount: float, count: int) -> float:
    return amount / count if count else math.nan
