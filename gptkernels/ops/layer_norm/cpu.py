"""Calls of LayerNorm's CPU kernels. The formulas are in csrc/cpu/layer_norm/params.h."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.cpu import DTYPE_CODES as _CODES
from gptkernels.core.cpu import address, module
from gptkernels.ops.layer_norm.outputs import bwd_outputs, fwd_outputs, matrix


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (..., C)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s, mean and rstd. s is empty if sum_dtype is None: s is x then."""
    outputs = y, s, mean, rstd = fwd_outputs(x, sum_dtype)
    if y.numel():
        to = (y.data_ptr(), s.data_ptr() if sum_dtype else 0, mean.data_ptr(), rstd.data_ptr())
        _forward(x, weight, bias, residual, rng, dropout_p, eps, sum_dtype, to)
    return outputs


def without_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Returns y and s as layer_norm_fwd does, of a contiguous x, where nobody will ask for
    gradients. s is x if sum_dtype is None."""
    y = torch.empty_like(x)
    s = x if sum_dtype is None else torch.empty_like(x, dtype=sum_dtype)
    if y.numel():
        to = (y.data_ptr(), s.data_ptr() if sum_dtype else 0, 0, 0)
        _forward(x, weight, bias, residual, rng, dropout_p, eps, sum_dtype, to)
    return y, s


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
    to: tuple[int, int, int, int],  # addresses of y, s, mean, rstd; the last two may be 0
) -> None:
    C = x.shape[-1]
    rows, x_stride = _rows(x)
    dtype = residual_dtype = _CODES[x.dtype]
    added, residual_stride = 0, 0
    if residual is not None:
        residual_rows, residual_stride = _rows(residual)
        added, residual_dtype = residual_rows.data_ptr(), _CODES[residual.dtype]
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    dropout = _dropout(rng, dropout_p) if dropout_p else (0, 0, 1.0)
    module().layer_norm_fwd(
        rows.data_ptr(), added, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), *to,
        x.numel() // C, C, x_stride, residual_stride, eps, *dropout, dtype, residual_dtype,
        _CODES[weight.dtype], dtype if sum_dtype is None else _CODES[sum_dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def _dropout(rng: Tensor | None, dropout_p: float) -> tuple[int, int, float]:
    """Returns rng's address, the threshold and the scale."""
    return address(rng), philox.threshold(dropout_p), philox.scale(dropout_p)


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dsum: Tensor | None,  # (..., C)
    s: Tensor,  # (..., C)
    mean: Tensor,  # (M,)
    rstd: Tensor,  # (M,)
    weight: Tensor,  # (C,)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight and dbias, each empty as in `op.layer_norm_bwd`."""
    dx, dresidual, dweight, dbias = bwd_outputs(
        s, weight, x_dtype, residual_dtype, weight_gradient, bias_gradient
    )
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    C = s.shape[-1]
    rows, sum_stride = _rows(s)
    dy = dy.to(x_dtype).contiguous()
    dsum = None if dsum is None else dsum.to(s.dtype).contiguous()
    weight = weight.contiguous()
    dropout = _dropout(rng, dropout_p) if dropout_p else (0, 0, 1.0)
    module().layer_norm_bwd(
        dy.data_ptr(), address(dsum), rows.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        weight.data_ptr(), dx.data_ptr(), 0 if residual_dtype is None else dresidual.data_ptr(),
        dweight.data_ptr() if weight_gradient else 0, dbias.data_ptr() if bias_gradient else 0,
        s.numel() // C, C, sum_stride, *dropout, _CODES[x_dtype],
        _CODES[residual_dtype or x_dtype], _CODES[weight.dtype], _CODES[s.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Returns x as rows with a unit stride between columns, and the stride between rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = matrix(x)
    return rows, rows.stride(0)
