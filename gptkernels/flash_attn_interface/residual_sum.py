"""Dropout, a residual sum and LayerNorm, with all that flash-attn's functions add to it.

    s = dropout(x * rowscale * colscale) + dropout(x1) + residual
    y = LayerNorm(s) * weight + bias        for each weight and bias

`gptkernels.layer_norm` has dropout(x) + residual and one weight; that is one fused call. What else
is asked for is composed of PyTorch's operators around it, in fp32, since flash-attn's kernels round
nothing before the sum is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gptkernels.core import masks, philox
from gptkernels.core.checks import check_shape, check_tensor
from gptkernels.flash_attn_interface.dropout_seed import upcoming
from gptkernels.ops.layer_norm.op import layer_norm

Affine = tuple[Tensor, Tensor | None]  # weight and bias, (C,) each


class Terms(NamedTuple):
    """What is added up, and how s and y are kept."""

    x: Tensor  # (..., C)
    residual: Tensor | None = None  # (..., C)
    x1: Tensor | None = None  # (..., C)
    rowscale: Tensor | None = None  # (...)
    colscale: Tensor | None = None  # (C,)
    dropout_p: float = 0.0
    residual_in_fp32: bool = False  # without a residual, whose dtype s has
    out_dtype: torch.dtype | None = None  # None: that of x


class Normed(NamedTuple):
    """The outputs, one for each weight; s; and which elements of x and x1 dropout kept."""

    ys: list[Tensor]
    s: Tensor | None
    kept: Tensor | None
    kept1: Tensor | None


def affines(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
) -> list[Affine]:
    """The weights (C,) of x (..., C), each with its bias. Raises TypeError, ValueError."""
    check_tensor("x", x)
    if weight1 is None and bias1 is not None:
        raise ValueError("bias1 must be None without weight1")
    named: dict[str, Any] = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    for name, parameter in named.items():
        if parameter is not None or name == "weight":
            check_tensor(name, parameter)
            check_shape(name, parameter, x.shape[-1:], "the last dimension of x")
    return [(weight, bias)] if weight1 is None else [(weight, bias), (weight1, bias1)]


def normed(
    terms: Terms,
    weights: Sequence[Affine],
    eps: float,
    *,
    prenorm: bool = False,
    mask: bool = False,
) -> Normed:
    """LayerNorm of the sum, with the weights of `affines`. s may be None unless `prenorm`. The
    masks, bool, are None without dropout, and `kept` is for `mask` alone. Raises TypeError,
    ValueError."""
    x, residual, p = terms.x, terms.residual, terms.dropout_p
    y_dtype, s_dtype = terms.out_dtype or x.dtype, _sum_dtype(terms)
    if (
        not (terms.x1 is terms.rowscale is terms.colscale is None)
        or y_dtype != x.dtype
        or len(weights) > 1
    ):
        x = x.float()
    x = _scaled(x, terms.rowscale, terms.colscale)
    kept = kept1 = None
    if terms.x1 is not None:
        check_shape("x1", terms.x1, tuple(x.shape), "that of x")
        x1 = terms.x1.float()
        if p > 0:
            kept1 = masks.elementwise_keep(philox.draw(x.device), p, x.shape)
            x1 = torch.where(kept1, x1 * philox.scale(p), 0)
        residual = x1 if residual is None else x1 + residual
    if mask and p > 0:
        kept = masks.elementwise_keep(upcoming(x.device), p, x.shape)
    (weight, bias), *others = (_alike(*affine) for affine in weights)
    stored = prenorm or len(others) > 0
    found = layer_norm(
        x, weight, bias, residual=residual, dropout_p=p, eps=eps, prenorm=stored,
        residual_in_fp32=s_dtype != x.dtype,
    )  # fmt: skip
    if not isinstance(found, tuple):
        return Normed([found.to(y_dtype)], None, kept, kept1)
    y, s = found
    ys = [y, *(cast(Tensor, layer_norm(s, *affine, eps=eps)) for affine in others)]
    return Normed([y.to(y_dtype) for y in ys], s.to(s_dtype), kept, kept1)


def _sum_dtype(terms: Terms) -> torch.dtype:
    if terms.residual is not None:
        return terms.residual.dtype
    return torch.float32 if terms.residual_in_fp32 else terms.x.dtype


def _scaled(x: Tensor, rowscale: Tensor | None, colscale: Tensor | None) -> Tensor:
    if rowscale is not None:
        check_shape("rowscale", rowscale, tuple(x.shape[:-1]), "the rows of x")
        x = x * rowscale[..., None]
    if colscale is not None:
        check_shape("layerscale", colscale, tuple(x.shape[-1:]), "the last dimension of x")
        x = x * colscale
    return x


def _alike(weight: Tensor, bias: Tensor | None) -> Affine:
    """A weight and a bias in one dtype, as `layer_norm` wants them."""
    if bias is None or bias.dtype == weight.dtype:
        return weight, bias
    return weight.float(), bias.float()
