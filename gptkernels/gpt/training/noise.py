"""The gradient noise scale: about how large a batch may be before a larger one helps little.

    B_noise = tr(S) / |G|^2           G the gradient of the loss, S the covariance of the gradients
                                      of single windows of text
    E |g_B|^2 = |G|^2 + tr(S) / B     g_B the mean gradient of B windows

So the norms at two batch sizes, of b and of B windows, give two estimates without bias:

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)
    tr(S) = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)

Here b is a step's first micro-batch and B the whole step, whose gradients training computes anyway.
The estimates of one step are too rough to be divided: each is summed over steps first.

McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, section 2.2, appendix A.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseScale:
    """The two estimates, summed over steps.

    Fields:
        sums: (2,) float64 on the device, of tr(S) and of |G|^2.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, small_norm: Tensor, large_norm: Tensor, small: int, large: int) -> None:
        """Add a step's estimates: the norms, (), of the mean gradients of `small` and, more than
        that, of `large` windows. Nothing is added where a norm is not finite, nor waited for."""
        small_square, large_square = small_norm.double() ** 2, large_norm.double() ** 2
        trace = (small_square - large_square) / (1 / small - 1 / large)
        square = (large * large_square - small * small_square) / (large - small)
        estimates = torch.stack([trace, square])
        self.sums += torch.where(estimates.isfinite().all(), estimates, 0.0)

    def read(self) -> float | None:
        """The noise scale in windows, of all steps since `restart`; waits for the device.

        None where no step was added, or where so few were that chance leaves no positive |G|^2.
        For the same reason it may be negative.
        """
        trace, square = self.sums.tolist()
        return trace / square if square > 0 else None

    def restart(self) -> None:
        """Forget the steps so far."""
        self.sums.zero_()
