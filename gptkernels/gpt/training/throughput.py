"""How fast training is: tokens per second, and MFU, the share of the machine's arithmetic it uses.

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

import time

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
