"""The ops as formulas, written out in plain PyTorch: the definition of every result.

Any floating dtype; in fp64 this is the truth that everything else is held to
(`gptkernels.parity`). Signatures are those of the public functions less `impl`, plus `rng`, the
(seed, offset) of `gptkernels.philox` that dropout uses. Differentiable by autograd.
"""

from __future__ import annotations

import math

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

    Ba et al., 2016. x, residual (..., C); weight, bias (C,). Mean and mean squared deviation are
    taken over C. Returns y in x.dtype, or (y, s).
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


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """y = gelu(x w1^T + b1) w2^T + b2; x (..., C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,).

    gelu(h) = h Phi(h), Phi the normal distribution function: exact ("none"), or approximated by
    0.5 (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) ("tanh") (Hendrycks and Gimpel, 2016).
    """
    h = x @ w1.T
    if b1 is not None:
        h = h + b1
    if approximate == "tanh":
        phi = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        phi = 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    y = (h * phi) @ w2.T
    return y if b2 is None else y + b2
