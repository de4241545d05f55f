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
    _forward(
        x, weight, bias, residual, rng, dropout_p, eps,
        y, None if sum_dtype is None else s, mean.data_ptr(), rstd.data_ptr(),
    )  # fmt: skip
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
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y and s as layer_norm_fwd does, of a contiguous x, where nobody will ask for
    gradients. s is x if sum_dtype is None; unless `keep_s`, it holds nothing of use."""
    y, s = torch.empty_like(x), None
    if sum_dtype is not None:
        # The kernel's second pass reads an element of s just before it writes that of y.
        shared = not keep_s and sum_dtype == x.dtype
        s = y if shared else torch.empty_like(x, dtype=sum_dtype)
    _forward(x, weight, bias, residual, rng, dropout_p, eps, y, s, 0, 0)
    return y, x if s is None else s


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    y: Tensor,
    s: Tensor | None,
    mean: int,  # an address, or 0: not wanted
    rstd: int,
) -> None:
    numel = x.numel()
    if numel == 0:
        return
    C = x_stride = residual_stride = x.shape[-1]
    if not x.is_contiguous():
        x = matrix(x)
        x_stride = x.stride(0)
    dtype = residual_dtype = sum_dtype = _CODES[x.dtype]
    if s is not None:
        sum_dtype = _CODES[s.dtype]
    if residual is not None:
        residual_dtype = _CODES[residual.dtype]
        if not residual.is_contiguous():
            residual = matrix(residual)
            residual_stride = residual.stride(0)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    dropout = _dropout(rng, dropout_p) if dropout_p else _NO_DROPOUT
    module().layer_norm_fwd(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), 0 if s is None else s.data_ptr(),
        mean, rstd, numel // C, C, x_stride, residual_stride, eps, *dropout, dtype,
        residual_dtype, _CODES[weight.dtype], sum_dtype, torch.get_num_threads(),
    )  # fmt: skip


# rng's address, the threshold and the scale.
_NO_DROPOUT = (0, 0, 1.0)


def _dropout(rng: Tensor | None, dropout_p: float) -> tuple[int, int, float]:
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
    numel = s.numel()
    if numel == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    C = sum_stride = s.shape[-1]
    if not s.is_contiguous():
        s = matrix(s)
        sum_stride = s.stride(0)
    if dy.dtype != x_dtype:  # a conversion that does nothing takes longer than the question
        dy = dy.to(x_dtype)
    dy = dy.contiguous()
    dsum = None if dsum is None else dsum.to(s.dtype).contiguous()
    weight = weight.contiguous()
    dropout = _dropout(rng, dropout_p) if dropout_p else _NO_DROPOUT
    module().layer_norm_bwd(
        dy.data_ptr(), address(dsum), s.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        weight.data_ptr(), dx.data_ptr(), 0 if residual_dtype is None else dresidual.data_ptr(),
        dweight.data_ptr() if weight_gradient else 0, dbias.data_ptr() if bias_gradient else 0,
        numel // C, C, sum_stride, *dropout, _CODES[x_dtype],
        _CODES[residual_dtype or x_dtype], _CODES[weight.dtype], _CODES[s.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias
