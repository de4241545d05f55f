"""The ops as formulas, written out in plain PyTorch: the definition of every result.

Any floating dtype; in fp64 this is the truth that everything else is held to
(`gptkernels.parity`). Signatures are those of the public functions less `impl`, plus `rng`, the
(seed, offset) of `gptkernels.philox` that dropout uses. Differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels import philox


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    rng: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """s = dropout(x) + residual; y = (s - mean) / sqrt(var + eps) * weight + bias.

    Ba et al., 2016. x, residual (..., C); weight, bias (C,). The variance is the mean squared deviation, over C.
    Returns y in x.dtype, or (y, s).
    """
    s = x
    if dropout_p > 0:
        keep = philox.elementwise_keep(rng, dropout_p, x.shape)
        s = torch.where(keep, s * philox.scale(dropout_p), 0)
    if residual is not None:
        s = s + residual
    s = s.to(sum_dtype(x, residual, residual_in_fp32))
    mean = s.mean(dim=-1, keepdim=True)
    variance = (s - mean).square().mean(dim=-1, keepdim=True)
    y = (s - mean) / torch.sqrt(variance + eps) * weight
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    return (y, s) if prenorm else y


def sum_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """dtype of s: that of x, or fp32 where asked or where the residual stream is kept in it."""
    wants_fp32 = residual_in_fp32 or (residual is not None and residual.dtype == torch.float32)
    return torch.promote_types(x.dtype, torch.float32) if wants_fp32 else x.dtype
