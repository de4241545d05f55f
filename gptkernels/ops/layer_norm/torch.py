"""LayerNorm computed with torch.native_layer_norm, after dropout and the addition of the
residual."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import masks, philox

# Elements of rows that each thread widens at a time.
_CACHED = 2**16


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s, mean and rstd. s is empty if sum_dtype is None: s is x then. The formulas and
    shapes are in csrc/layer_norm/params.h."""
    s = x
    if dropout_p > 0:
        s = _dropout(s, rng, dropout_p)
    if residual is not None:
        # The addition comes before rounding: bf16 x and an fp32 residual are added in fp32.
        s = s + residual
    if sum_dtype is not None:
        s = s.to(sum_dtype).contiguous()
    dtype = _layer_norm_dtype(s, weight)
    bias = None if bias is None else _affine(bias, dtype)
    y, mean, rstd = torch.native_layer_norm(
        s.to(dtype), (x.shape[-1],), _affine(weight, dtype), bias, eps
    )
    y = y.to(x.dtype).contiguous()
    if sum_dtype is None:
        s = torch.empty(0, dtype=x.dtype, device=x.device)
    return y, s, mean.flatten(), rstd.flatten()


def layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight and dbias, each empty as in `op.layer_norm_bwd`."""
    ds, dweight, dbias = _gradients(dy, s, mean, rstd, weight, (weight_gradient, bias_gradient))
    if dsum is not None:
        ds = ds + dsum
    dresidual = ds
    if residual_dtype is None:
        dresidual = ds.new_empty(0, dtype=x_dtype)
    elif residual_dtype != ds.dtype:
        dresidual = ds.to(residual_dtype)
    dx = _dropout(ds, rng, dropout_p) if dropout_p > 0 else ds
    return (
        dx.to(x_dtype).contiguous(),
        dresidual.contiguous(),
        dweight.to(weight.dtype) if weight_gradient else weight.new_empty(0),
        dbias.to(weight.dtype) if bias_gradient else weight.new_empty(0),
    )


def _gradients(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of s, weight and bias, each in its tensor's dtype or in fp32. Those of
    weight and bias hold nothing unless `wanted`.

    PyTorch's operator has two faults on a CPU. It adds up the gradients of weight and bias in the
    dtype of the rows. And it loses digits of dx where a row's mean is larger than its deviation, so
    such rows are centred first.
    """
    dtype = _layer_norm_dtype(s, weight)
    mean, rstd = (x.view(*s.shape[:-1], 1) for x in (mean, rstd))
    affine = _affine(weight, dtype)
    if s.device.type == "cpu":
        if torch.compiler.is_compiling():  # there are no values yet, and centring is fused
            s, mean = s.float() - mean, torch.zeros_like(mean)
        elif s.dtype != torch.float32:
            return _gradients_of_narrow_rows(dy, s, mean, rstd, affine, wanted)
        elif s.numel() and ((mean * rstd).abs() > 1).any():
            s, mean = s - mean, torch.zeros_like(mean)
    return _native_gradients(dy.to(dtype), s.to(dtype), mean, rstd, affine, wanted)


def _gradients_of_narrow_rows(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients` in fp32. A few rows at a time are widened and centred, so their fp32 copies stay
    in the cache."""
    C = s.shape[-1]
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight)
    few = max(1, _CACHED * torch.get_num_threads() // C)
    blocks = (x.reshape(-1, x.shape[-1]).split(few) for x in (ds, dy, s, mean, rstd))
    for ds_few, dy_few, s_few, mean_few, rstd_few in zip(*blocks, strict=True):
        centred = s_few.float().sub_(mean_few)
        found, *partial = _native_gradients(
            dy_few.float(), centred, torch.zeros_like(mean_few), rstd_few, weight, wanted
        )
        ds_few.copy_(found)
        for total, part in zip((dweight, dbias), partial, strict=True):
            if part is not None:
                total += part
    return ds, dweight, dbias


def _native_gradients(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(
        dy, s, (s.shape[-1],), mean, rstd, weight, weight, (True, *wanted)
    )


def _layer_norm_dtype(s: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype in which PyTorch's LayerNorm runs. It wants s and weight in one dtype; a
    CPU also takes 16-bit rows with fp32 weights. All other mixtures run in fp32, and so do 16-bit
    rows that are compiled for a CPU: Inductor's own formula would round their statistics."""
    if torch.compiler.is_compiling() and s.device.type == "cpu":
        return torch.float32
    return s.dtype if s.dtype == weight.dtype or s.device.type == "cpu" else torch.float32


def _affine(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns weight or bias as PyTorch's LayerNorm takes it. On a CPU it is always fp32: that also
    makes PyTorch keep the statistics of 16-bit rows in fp32."""
    return parameter.float() if parameter.device.type == "cpu" else parameter.to(dtype)


def _dropout(x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    keep = masks.elementwise_keep(rng, dropout_p, x.shape)
    return torch.where(keep, x * philox.scale(dropout_p), 0)
