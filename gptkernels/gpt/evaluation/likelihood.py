"""How likely a model finds texts behind others.

    log p(c | g) = sum over i of log softmax(logits behind g c_1 ... c_(i-1))[c_i]

Several candidates c behind one g share its keys and values, which are computed once:

    g                  one row; the logits of its last token give c_1 of every candidate
    c_1 ... c_(n-1)    rows of candidates, padded at their ends, that continue copies of g's slot;
                       their logits give c_2 ... c_n. A candidate of one token needs no such row

A candidate that is alone runs as g c_1 ... c_(n-1), in a row of a batch that is padded at its end.
Attention is causal: nothing that counts sees the padding. The head reads only the places that
predict a token of a candidate, some of them at a time, since a row of logits is wide.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gptkernels.core.checks import check_count
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.gpt.generation.choices import choices_of, running
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import autocast, full_logits

_WINDOW = 16  # batches among which rows of like length are looked for
_LOGITS = 64 * 2**20  # bytes of fp32 logits that exist at once


@dataclass(frozen=True, slots=True)
class Question:
    """Some tokens, and what may follow them.

    Fields:
        given: the ids that all candidates follow, at least one.
        candidates: at least one, each of at least one id.

    Raises ValueError for too few of them.
    """

    given: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.given:
            raise ValueError("given must hold at least one token, got none")
        if not (self.candidates and all(self.candidates)):
            raise ValueError(
                f"candidates must be at least one, each of at least one token, "
                f"got {self.candidates}"
            )

    @property
    def length(self) -> int:
        """How many tokens the model reads for the longest candidate, whose last it only
        predicts."""
        return len(self.given) + max(map(len, self.candidates)) - 1


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one candidate. The sum of two is that of the one with the other behind it.

    Fields:
        total: the log-probability of all its tokens, in nats.
        tokens: how many they are.
        greedy: whether each is the likeliest one in its place.
    """

    total: float
    tokens: int
    greedy: bool

    def __add__(self, behind: Likelihood) -> Likelihood:
        return Likelihood(
            self.total + behind.total, self.tokens + behind.tokens, self.greedy and behind.greedy
        )


@dataclass(slots=True)
class Counts:
    """What a `Scorer` has done.

    Fields:
        prefixes: how often it has computed what a question gives.
        prefix_tokens: the tokens of these.
        candidate_tokens: the candidates' tokens, each of which it has predicted once.
        reused_tokens: the given tokens that it would also have computed with a row for each
            candidate.
    """

    prefixes: int = 0
    prefix_tokens: int = 0
    candidate_tokens: int = 0
    reused_tokens: int = 0


class Scorer:
    """Computes the log-probabilities of candidates.

    model: runs in evaluation mode, in which it is left.
    vocab_size: only ids below it take part in the softmax, for a model whose vocabulary is padded
        past its tokenizer's.
    batch_size: how many rows run at a time.
    dtype: float32, or a narrower one for autocast; logits and log-probabilities are computed in
        float32.

    counts: what it has done so far.

    Raises TypeError and ValueError for numbers out of range.
    """

    def __init__(
        self,
        model: GPT,
        *,
        vocab_size: int,
        batch_size: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        known = model.config.vocab_size
        if check_count("vocab_size", vocab_size) > known:
            raise ValueError(f"vocab_size must be at most the model's {known}, got {vocab_size}")
        self.counts = Counts()
        self._model, self._ids, self._dtype = model, vocab_size, dtype
        self._batch_size = check_count("batch_size", batch_size)
        self._choices = choices_of(model)
        self._device = next(model.parameters()).device
        self._rows_of_logits = max(1, _LOGITS // (4 * known))

    def score(self, questions: Iterable[Question]) -> Iterator[tuple[Likelihood, ...]]:
        """The likelihoods of each question's candidates, in their order.

        Questions are read as they are needed: those with one candidate some batches at a time,
        others one by one. Where one gives the same tokens as the one with several candidates before
        it, these are not computed again. The model's weights must stay the same meanwhile.

        Raises ValueError for a question that does not fit into the model's context or has an id
        that is none, and RuntimeError where the model's logits give no probabilities.
        """
        prefix: _Prefix | None = None
        for alone, group in itertools.groupby(
            map(self._checked, questions), key=lambda question: len(question.candidates) == 1
        ):
            if alone:
                while window := list(itertools.islice(group, _WINDOW * self._batch_size)):
                    yield from self._rows(window)
                continue
            for question in group:
                runs = len(question.candidates)  # that do not compute what is given
                if prefix is None or prefix.tokens != question.given:
                    prefix = self._prefix(question.given)
                    runs -= 1
                self.counts.reused_tokens += runs * len(question.given)
                yield self._behind(prefix, question.candidates)

    def _checked(self, question: Question) -> Question:
        size = self._model.config.block_size
        if question.length > size:
            raise ValueError(
                f"a question must fit into block_size={size}, got {len(question.given)} tokens and "
                f"a candidate of {max(map(len, question.candidates))} behind them"
            )
        for token in itertools.chain(question.given, *question.candidates):
            if not 0 <= token < self._ids:
                raise ValueError(f"a question's ids must lie in 0...{self._ids - 1}, got {token}")
        return question

    def _rows(self, questions: Sequence[Question]) -> Iterator[tuple[Likelihood]]:
        """Of questions with one candidate each; rows of like length share a batch."""
        order = sorted(range(len(questions)), key=lambda i: -questions[i].length)
        found: dict[int, tuple[Likelihood]] = {}
        returned = 0
        for first in range(0, len(order), self._batch_size):
            numbers = order[first : first + self._batch_size]
            batch = [questions[i] for i in numbers]
            candidates = [question.candidates[0] for question in batch]
            with self._running():
                rows = [question.given + question.candidates[0][:-1] for question in batch]
                hidden = self._model.hidden_states(self._padded(rows))
                starts = [len(question.given) - 1 for question in batch]
                likelihoods = self._read(hidden, starts, candidates)
            self.counts.prefixes += len(batch)
            self.counts.prefix_tokens += sum(len(question.given) for question in batch)
            self.counts.candidate_tokens += sum(map(len, candidates))
            found.update(zip(numbers, zip(likelihoods), strict=True))
            while returned in found:
                yield found.pop(returned)
                returned += 1

    def _prefix(self, tokens: tuple[int, ...]) -> _Prefix:
        with self._running():
            cache = SlotCache(self._model, 1, len(tokens))
            hidden = self._model.hidden_states(self._padded([tokens]), cache=cache, slot=0)
            behind = self._logits(hidden[0, -1:])[0].log_softmax(0)
        self.counts.prefixes += 1
        self.counts.prefix_tokens += len(tokens)
        return _Prefix(tokens, cache, behind)

    def _behind(
        self, prefix: _Prefix, candidates: Sequence[tuple[int, ...]]
    ) -> tuple[Likelihood, ...]:
        """Of several candidates behind the same tokens."""
        with self._running():
            firsts = torch.tensor([candidate[0] for candidate in candidates], device=self._device)
            likely, greedy = prefix.behind[firsts], prefix.behind.argmax() == firsts
            found = _likelihoods(likely, greedy, [1] * len(candidates))
            longer = [i for i, candidate in enumerate(candidates) if len(candidate) > 1]
            longer.sort(key=lambda i: len(candidates[i]))
            for numbers in _even_parts(longer, self._batch_size):
                rows = self._padded([candidates[i][:-1] for i in numbers])
                following = [candidates[i][1:] for i in numbers]
                hidden = self._model.hidden_states(rows, cache=self._copies(prefix, *rows.shape))
                rest = self._read(hidden, [0] * len(numbers), following)
                for i, likelihood in zip(numbers, rest, strict=True):
                    found[i] += likelihood
        self.counts.candidate_tokens += sum(map(len, candidates))
        return tuple(found)

    def _copies(self, prefix: _Prefix, rows: int, room: int) -> SlotCache:
        """So many slots that hold the prefix, with room for as many more tokens each."""
        held = len(prefix.tokens)
        cache = SlotCache(self._model, rows, held + room)
        cache.copy(slice(None), prefix.cache, 0, held)
        return cache

    def _read(
        self, hidden: Tensor, starts: Sequence[int], following: Sequence[tuple[int, ...]]
    ) -> list[Likelihood]:
        """Of the tokens that follow in each row of hidden states (R, T, C), the first of which is
        predicted in the row's place `starts`."""
        T = hidden.shape[1]
        ranges = [
            torch.arange(len(tokens)) + (row * T + start)
            for row, (start, tokens) in enumerate(zip(starts, following, strict=True))
        ]
        places = torch.cat(ranges).to(self._device)
        targets = torch.tensor(list(itertools.chain(*following)), device=self._device)
        likely, greedy = [], []
        for some, wanted in zip(
            places.split(self._rows_of_logits), targets.split(self._rows_of_logits), strict=True
        ):
            logits = self._logits(hidden.flatten(0, 1)[some])
            likely.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == wanted)
        return _likelihoods(torch.cat(likely), torch.cat(greedy), [len(x) for x in following])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, C) to fp32 logits (N, ids)."""
        return full_logits(self._model, hidden)[:, : self._ids]

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Rows of tokens as (R, T) int64, with zeros behind the shorter ones."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self._model.eval()
        with (
            torch.inference_mode(),
            autocast(self._device, self._dtype),
            running(self._choices, self._device.type),
        ):
            yield


@dataclass(frozen=True, slots=True)
class _Prefix:
    """Tokens that were computed: their keys and values, in a cache's only slot, and the
    log-probabilities (ids,) of what follows them."""

    tokens: tuple[int, ...]
    cache: SlotCache
    behind: Tensor


def _even_parts(items: list[int], most: int) -> Iterator[list[int]]:
    """`items` in as few parts of at most `most` as there can be, of like size."""
    if items:
        size = math.ceil(len(items) / math.ceil(len(items) / most))
        for first in range(0, len(items), size):
            yield items[first : first + size]


def _likelihoods(likely: Tensor, greedy: Tensor, lengths: Sequence[int]) -> list[Likelihood]:
    """Of rows of such lengths, from the log-probabilities (N,) of their tokens, one row's behind
    the other's, and whether each token is the likeliest."""
    # A single copy, so that the host waits once; fp64 holds both exactly.
    both = torch.stack([likely.double(), greedy.double()]).cpu().split(list(lengths), dim=1)
    found = [Likelihood(row[0].sum().item(), len(row[0]), bool(row[1].all())) for row in both]
    if not all(math.isfinite(likelihood.total) for likelihood in found):
        raise RuntimeError(
            "the model's logits hold NaN or infinity: its weights are broken, or too large for "
            "its dtype"
        )
    return found
