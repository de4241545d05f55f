"""What LayerNorm's fakes and launchers share: the tensors of results, and rows as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def fwd_outputs(x: Tensor, sum_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates y, s, mean (M,) and rstd (M,) for x (..., C); s is empty without a sum_dtype."""
    y = _contiguous_like(x)
    s = y.new_empty(0) if sum_dtype is None else torch.empty_like(y, dtype=sum_dtype)
    mean = y.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return y, s, mean, torch.empty_like(mean)


def bwd_outputs(
    s: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates dx, dresidual, dweight and dbias, each empty where it is not wanted."""
    dx = _contiguous_like(s, x_dtype)
    dresidual = (
        dx.new_empty(0) if residual_dtype is None else torch.empty_like(dx, dtype=residual_dtype)
    )
    dweight = _contiguous_like(weight) if weight_gradient else weight.new_empty(0)
    dbias = _contiguous_like(weight) if bias_gradient else weight.new_empty(0)
    return dx, dresidual, dweight, dbias


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like(x), contiguous. To name that layout costs a small kernel's time."""
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def matrix(x: Tensor) -> Tensor:
    """x as a matrix (M, C) with a unit last stride: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
