"""From logits to tokens: pure functions of (R, V) logits, and the settings of R slots.

    s = logits in fp32; then, in this order, which is that of transformers' generate:
    repetition_penalty   s / penalty where s >= 0, s * penalty where s < 0, of tokens that the text
                         holds, its prompt included (Keskar et al., "CTRL", 2019)
    temperature          (s - max s) / temperature; at 0 the largest s is taken, and that is all
    top_k                keeps what is no less than the k-th largest
    top_p                keeps the fewest of the likeliest that reach p together (Holtzman et al.,
                         "The Curious Case of Neural Text Degeneration", 2020)
    min_p                keeps what is at least min_p times as likely as the likeliest (Nguyen et
                         al., "Turning Up the Heat", 2024)
    draw                 the token at which the summed probabilities pass u, u in [0, 1) by Philox
                         from (seed, sample, position)

A row's result depends on nothing but that row: probabilities are summed as integers, which no order
of addition changes, and u belongs to a place in a text, not to a slot or a step.
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

# Of the integers that stand for probabilities: sums of as many as a vocabulary has stay below
# 2**53, and so are exact in fp64 too.
_ONE = 2**52


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises TypeError and ValueError for values out of range.

    temperature: 0 takes the likeliest token (the first of several).
    top_k, top_p, min_p: None cuts nothing.
    repetition_penalty: above 1 makes tokens of the text so far less likely.
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
    """scores (R, V) with the penalty (R,) on what is seen (R, V) bool."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def cool(scores: Tensor, temperature: Tensor) -> Tensor:
    """(scores - max) / temperature, (R, V) fp32; temperature (R,) fp64, positive."""
    # Less the largest, so that a tiny temperature gives 0 and -inf, not inf and NaN. In fp64,
    # divided by a normal number at least: a GPU multiplies by the reciprocal, which would be inf.
    scores = scores.double()
    scores = scores - scores.amax(dim=-1, keepdim=True)
    return (scores / temperature.clamp(min=sys.float_info.min)[:, None]).float()


def keep_top_k(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """scores (R, V), -inf where below the k-th largest; k (R,) int64, 0 keeps all, at most
    `most`."""
    largest = scores.topk(min(most, scores.shape[-1])).values
    last = largest.gather(-1, (k.clamp(1, largest.shape[-1]) - 1)[:, None])
    return scores.masked_fill((scores < last) & (k > 0)[:, None], -math.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """scores (R, V), -inf where all that are at least as small make up no more than 1 - p; the
    largest always stays. p (R,) fp64, 1 keeps all."""
    ascending, ids = scores.sort(dim=-1, stable=True)
    summed = _integers(ascending).cumsum(dim=-1)
    cut = summed <= ((1 - p) * summed[:, -1])[:, None]
    cut &= (p < 1)[:, None]
    cut[:, -1] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter(-1, ids, cut), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """scores (R, V), -inf where less likely than min_p (R,) times the likeliest; 0 keeps all."""
    probabilities = scores.softmax(dim=-1)
    least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, -math.inf)


def draw(scores: Tensor, u: Tensor) -> Tensor:
    """One id for each row of scores (R, V), with probabilities softmax(scores): (R,) int64. u (R,)
    fp64 in [0, 1) decides."""
    summed = _integers(scores).cumsum(dim=-1)
    wanted = (u * summed[:, -1]).floor().long()
    chosen = torch.searchsorted(summed, wanted[:, None], right=True)[:, 0]
    return chosen.clamp(max=scores.shape[-1] - 1)  # past the end for NaN alone


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
        """From now on choose for `slot` what follows the ids `text`."""
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
        # Picked on the host: how many there are is not waited for.
        known = [token for token in text if token < self._seen.shape[1]]
        self._seen[slot, torch.tensor(known, dtype=torch.int64, device=self._seen.device)] = True

    def release(self, slot: int) -> None:
        """Choose anything for `slot`."""
        self._settings[slot] = None

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each slot, (R,) int64, and its log-probability, (R,) fp32, by the
        logits (R, V) fp32 as they are; NaN where those give no probabilities."""
        scores = logits
        active = [sampling for sampling in self._settings if sampling is not None]
        # What no slot asks for is left out: it would change nothing.
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
