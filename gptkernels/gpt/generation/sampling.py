"""From logits to tokens: pure functions of (R, V) logits, and the settings of R slots.

    s = logits in fp32; then, in this order, which is that of transformers' generate:
    repetition_penalty   s / penalty where s >= 0, s * penalty where s < 0, for the tokens of the
                         text, its prompt included (Keskar et al., "CTRL", 2019)
    temperature          (s - max s) / temperature; 0 takes the largest s and skips the rest
    top_k                keeps the tokens whose s is no less than the k-th largest
    top_p                keeps the likeliest tokens, as few as reach p together (Holtzman et al.,
                         "The Curious Case of Neural Text Degeneration", 2020)
    min_p                keeps the tokens at least min_p times as likely as the likeliest (Nguyen et
                         al., "Turning Up the Heat", 2024)
    draw                 the token at which the summed probabilities pass u, u in [0, 1) by Philox
                         from (seed, sample, position)

A row's result depends on that row alone: probabilities are summed as integers, so that the order of
addition does not matter, and u depends on the place in the text, not on the slot or the step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.checks import check_count, check_number

# The integer that stands for probability 1. The sum over a vocabulary stays below 2**53, so fp64
# holds it exactly.
_ONE = 2**52


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises TypeError and ValueError for values out of range.

    temperature: 0 takes the likeliest token (the first of several).
    top_k, top_p, min_p: None removes no token.
    repetition_penalty: above 1 makes the tokens that the text already holds less likely.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            if not 0.0 < self.top_p <= 1.0:
                raise ValueError(
                    f"top_p must lie above 0 and at most at 1, or be None, got {self.top_p}"
                )
        if self.min_p is not None:
            check_number("min_p", self.min_p)
            if not 0.0 <= self.min_p <= 1.0:
                raise ValueError(f"min_p must lie in 0...1 or be None, got {self.min_p}")
        check_number("repetition_penalty", self.repetition_penalty)
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}"
            )


def penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """scores (R, V) with the penalty (R,) applied where seen (R, V) is True."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def cool(scores: Tensor, temperature: Tensor) -> Tensor:
    """(scores - max) / temperature, (R, V) fp32; temperature (R,) fp64, positive."""
    # The largest is subtracted so that a tiny temperature gives 0 and -inf, not inf and NaN. The
    # divisor is at least the smallest normal number: a GPU multiplies by the reciprocal, and that
    # of a smaller one is inf.
    scores = scores.double()
    scores = scores - scores.amax(dim=-1, keepdim=True)
    return (scores / temperature.clamp(min=sys.float_info.min)[:, None]).float()


def keep_top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """scores (R, V), with -inf where they are below the k-th largest. k (R,) int64 is at most
    `most`; 0 keeps all."""
    largest = scores.topk(min(most, scores.shape[-1])).values
    last = largest.gather(-1, (k.clamp(1, largest.shape[-1]) - 1)[:, None])
    return scores.masked_fill((scores < last) & (k > 0)[:, None], -math.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """scores (R, V), with -inf for the unlikeliest tokens, as many as have a probability of at most
    1 - p together; the likeliest always stays. p (R,) fp64; 1 keeps all."""
    ascending, ids = scores.sort(dim=-1, stable=True)
    summed = _integers(ascending).cumsum(dim=-1)
    cut = summed <= ((1 - p) * summed[:, -1])[:, None]
    cut &= (p < 1)[:, None]
    cut[:, -1] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter(-1, ids, cut), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """scores (R, V), with -inf where less likely than min_p (R,) times the likeliest; 0 keeps
    all."""
    probabilities = scores.softmax(dim=-1)
    least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, -math.inf)


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """An id for each row of scores (R, V), with probabilities softmax(scores): (R,) int64. u (R,)
    fp64 in [0, 1) decides which."""
    summed = _integers(scores).cumsum(dim=-1)
    wanted = (u * summed[:, -1]).floor().long()
    chosen = torch.searchsorted(summed, wanted[:, None], right=True)[:, 0]
    return chosen.clamp(max=scores.shape[-1] - 1)  # only NaN leads past the end


def _integers(scores: Tensor) -> Tensor:
    return (scores.double().softmax(dim=-1) * _ONE).round().long()


class Sampler:
    """The settings of R slots, on the device, and the choice of R tokens by them."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        def row(dtype: torch.dtype) -> Tensor:
            return torch.ones(slots, dtype=dtype, device=device)

        self._settings: list[Sampling | None] = [None] * slots
        self._temperature, self._top_p = row(torch.float64), row(torch.float64)
        self._min_p, self._penalty = row(torch.float32), row(torch.float32)
        self._top_k, self._greedy = row(torch.int64), row(torch.bool)
        self._seeds, self._samples = row(torch.int64), row(torch.int64)
        self._positions = row(torch.int64)
        self._seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def begin(
        self, slot: int, sampling: Sampling, seed: int, sample: int, text: Sequence[int]
    ) -> None:
        """From now on continue the ids `text` in `slot`."""
        self._settings[slot] = sampling
        self._greedy[slot] = sampling.temperature == 0
        self._temperature[slot] = sampling.temperature or 1.0
        self._top_k[slot] = sampling.top_k or 0
        self._top_p[slot] = sampling.top_p or 1.0
        self._min_p[slot] = sampling.min_p or 0.0
        self._penalty[slot] = sampling.repetition_penalty
        self._seeds[slot] = seed if seed < 2**63 else seed - 2**64
        self._samples[slot] = sample
        self._positions[slot] = len(text)
        self._seen[slot] = False
        # Filtered on the host: on a GPU, the number of ids left would have to be waited for.
        known = [token for token in text if token < self._seen.shape[1]]
        self._seen[slot, torch.tensor(known, dtype=torch.int64, device=self._seen.device)] = True

    def release(self, slot: int) -> None:
        """Stop choosing for `slot`: `choose` may give it any token."""
        self._settings[slot] = None

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each slot, (R,) int64, and its log-probability, (R,) fp32, by the
        unchanged logits (R, V) fp32; it is NaN where those give no probabilities."""
        scores = logits
        active = [sampling for sampling in self._settings if sampling is not None]
        # A setting that no slot uses is skipped: it would change nothing.
        if any(sampling.repetition_penalty != 1 for sampling in active):
            scores = penalise(scores, self._seen, self._penalty)
        tokens = scores.argmax(dim=-1)
        if any(sampling.temperature > 0 for sampling in active):
            tokens = torch.where(self._greedy, tokens, self._sample(scores, active))
        self._seen.scatter_(1, tokens[:, None], True)
        self._positions += 1
        all_of = logits.logsumexp(dim=-1)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - all_of

    def _sample(self, scores: Tensor, active: list[Sampling]) -> Tensor:
        scores = cool(scores, self._temperature)
        most = max(sampling.top_k or 0 for sampling in active)
        if most:
            scores = keep_top_k(scores, self._top_k, most)
        if any((sampling.top_p or 1) < 1 for sampling in active):
            scores = keep_top_p(scores, self._top_p)
        if any(sampling.min_p for sampling in active):
            scores = keep_min_p(scores, self._min_p)
        return draw(scores, philox.uniform(self._seeds, self._samples, self._positions))
