"""LayerNorm computed with torch.native_layer_norm, after dropout and the addition of the
residual."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import philox


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
    y, mean, rstd = torch.native_layer_norm(
        s.to(dtype), (x.shape[-1],), _affine(weight, dtype), _affine(bias, dtype), eps
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
    dtype = _layer_norm_dtype(s, weight)
    statistics = (*s.shape[:-1], 1)
    ds, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype),
        s.to(dtype),
        (s.shape[-1],),
        mean.view(statistics),
        rstd.view(statistics),
        _affine(weight, dtype),
        _affine(weight, dtype) if bias_gradient else None,
        (True, weight_gradient, bias_gradient),
    )
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


def _layer_norm_dtype(s: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype in which PyTorch's LayerNorm runs. It wants s and weight in one dtype; a
    CPU also takes 16-bit rows with fp32 weights. All other mixtures run in fp32."""
    return s.dtype if s.dtype == weight.dtype or s.device.type == "cpu" else torch.float32


def _affine(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns weight or bias as PyTorch's LayerNorm takes it. On a CPU it is always fp32: that also
    makes PyTorch keep the statistics of 16-bit rows in fp32."""
    if parameter is None:
        return None
    return parameter.float() if parameter.device.type == "cpu" else parameter.to(dtype)


def _dropout(x: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    keep = philox.elementwise_keep(rng, dropout_p, x.shape)
    return torch.where(keep, x * philox.scale(dropout_p), 0)
