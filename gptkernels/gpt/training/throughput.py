"""How fast training is: tokens per second, and MFU, the share of the machine's arithmetic it uses;
and so, how long the rest of it takes.

    FLOP per token = 6 N + 12 L C T        (forward 2, backward 4; Chowdhery et al. 2022, app. B)
        N  parameters that multiply activations: all but the position table (the tied token
           table counts once, as the head)
        L layers, C model width, T context: scores and weighted values, causality not deducted
    MFU = FLOP per token * tokens per second / peak FLOP per second

The peak is this machine's ceiling: the best rate of matrix products that was measured on it
(`gptkernels.core.ceilings`), which the benchmarks use too. Where it is unknown, or less than what
training reaches, the MFU is None rather than a guess.

What a run took in all is told in petaflop/s-days, 1e15 FLOP a second for a day, as Brown et al.
(2020, appendix D) do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from torch import nn


def flops_per_token(model: nn.Module, n_layer: int, n_embd: int, block_size: int) -> float:
    """Floating-point operations one token of a training step takes: 6 N + 12 L C T (see above)."""
    parameters = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.endswith("wpe.weight")
    )
    return 6.0 * parameters + 12.0 * n_layer * n_embd * block_size


def petaflop_s_days(flops: float, tokens: int) -> float:
    """The compute of training on `tokens` tokens, of `flops` FLOP each."""
    return flops * tokens / (1e15 * 24 * 60 * 60)


class Speed:
    """Tokens per second, and MFU by the FLOP of a token and the machine's peak, if it is known."""

    def __init__(self, flops: float, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Count from now on, when `tokens` tokens have been trained on."""
        self._tokens, self._start = tokens, time.perf_counter()

    def read(self, tokens: int) -> dict[str, float | None]:
        """What it was since `restart`, now that `tokens` tokens have been trained on."""
        speed = (tokens - self._tokens) / (time.perf_counter() - self._start)
        share = None if self._peak is None else speed * self._flops / self._peak
        return {"tokens_per_s": speed, "mfu": None if share is None or share > 1 else share}


class Pace:
    """How long the rest of a run takes, by how long its steps and its validations took so far.

    The first step is left out: what it compiles, loads and looks up is there from then on.
    """

    _LEAST_S = 2.0

    def __init__(self) -> None:
        self._start: float | None = None  # when the first step was over
        self._tokens = 0  # since then
        self._apart_s = 0.0  # of what is in between and no step
        self._validations, self._validation_s = 0, 0.0

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """In this context a validation is made, which counts if it is not given up."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self._validations += 1
        self._validation_s += took
        if self._start is not None:
            self._apart_s += took

    def stepped(self, tokens: int) -> None:
        """A step on `tokens` tokens was made."""
        if self._start is None:
            self._start = time.perf_counter()
        else:
            self._tokens += tokens

    def left_s(self, tokens: int, validations: int) -> float | None:
        """The seconds that training on `tokens` more tokens, with so many validations, takes; None
        until there were steps of 2 seconds."""
        if self._start is None or not self._tokens:
            return None
        steps_s = time.perf_counter() - self._start - self._apart_s
        if steps_s < self._LEAST_S:
            return None
        each_s = self._validation_s / self._validations if self._validations else 0.0
        return steps_s / self._tokens * tokens + each_s * validations
