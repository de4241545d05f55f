"""The Triton kernels of linear_cross_entropy and their launchers."""

from gptkernels.ops.linear_cross_entropy.triton.launch import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd"]
