"""flash-attn's LayerNorm of a residual sum: layer_norm_fn of flash_attn.ops.triton.layer_norm, and
the older functions of flash_attn.ops.layer_norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.checks import DTYPES, check_probability, check_shape, check_tensor
from gptkernels.flash_attn_interface.residual_sum import Terms, affines, normed


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """LayerNorm of a residual sum, as `flash_attn.ops.triton.layer_norm.layer_norm_fn`.

        s = dropout(x * rowscale) + dropout(x1) + residual, rounded to its dtype
        y = LayerNorm(s) * weight + bias,   y1 = LayerNorm(s) * weight1 + bias1

    It is one call of `gptkernels.layer_norm` unless x1, weight1, rowscale or out_dtype is given,
    which are PyTorch's operators around it, in float32.

    Args:
        x: Input (..., C), float32, bfloat16 or float16.
        weight, bias: (C,); bias may be None.
        residual: (..., C) or None. s has its dtype.
        x1: (..., C) or None, a second input, with a dropout mask of its own. Not with rowscale.
        weight1, bias1: (C,), of a second output, or None.
        eps: Number added to the variance.
        dropout_p: Probability of dropping an element of x and of x1; 0.0 outside training.
        rowscale: (...) or None, a factor for each row of x.
        prenorm: Whether to return s too.
        residual_in_fp32: Whether s is float32 where there is no residual; else it has x's dtype.
        zero_centered_weight: Whether 1 is added to weight and weight1, in float32.
        is_rms_norm: Refused: there is no RMSNorm.
        return_dropout_mask: Whether to return the masks too.
        out_dtype: The dtype of y and y1; None means x's.
        out, residual_out: Refused: results have memory of their own.

    Returns:
        y; then y1 if weight1 is given; then s if prenorm; then with return_dropout_mask the masks
        of x and of x1, bool and True where kept, None without dropout, or without x1. A tuple where
        there is more than y.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device or range is wrong, or bias1
            is given without weight1.
        NotImplementedError: is_rms_norm, out or residual_out is given.

    Differentiable once in every tensor; flash-attn gives rowscale no gradient.
    """
    _refuse_rms_norm(is_rms_norm)
    for name, given in (("out", out), ("residual_out", residual_out)):
        if given is not None:
            raise NotImplementedError(f"{name} is not supported: results have their own memory")
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale must be None where x1 is given")
    if out_dtype not in (None, *DTYPES):
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    weights = affines(x, weight, bias, weight1, bias1)
    if zero_centered_weight:
        weights = [(w.float() + 1.0, b) for w, b in weights]
    terms = Terms(x, residual, x1, rowscale, None, dropout_p, residual_in_fp32, out_dtype)
    ys, s, kept, kept1 = normed(terms, weights, eps, prenorm=prenorm, mask=return_dropout_mask)
    found = [*ys, *([s] if prenorm else []), *([kept, kept1] if return_dropout_mask else [])]
    return tuple(found) if len(found) > 1 else ys[0]


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear layer of `layer_norm_fn`'s y, as
    `flash_attn.ops.triton.layer_norm.layer_norm_linear_fn`: two calls, and y is kept for the
    backward pass, where flash-attn computes it again.

    Args:
        x: Input (..., C), float32, bfloat16 or float16.
        norm_weight, norm_bias: (C,); norm_bias may be None.
        linear_weight, linear_bias: (F, C) and (F,), converted to autocast's dtype, or without
            autocast to x's; linear_bias may be None.
        residual, eps, prenorm, residual_in_fp32: As for `layer_norm_fn`.
        is_rms_norm: Refused: there is no RMSNorm.

    Returns:
        (..., F) in that dtype; with prenorm, (out, s).

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device or range is wrong.
        NotImplementedError: is_rms_norm is given.

    Differentiable once in every tensor.
    """
    _refuse_rms_norm(is_rms_norm)
    terms = Terms(x, residual, residual_in_fp32=residual_in_fp32)
    weights = affines(x, norm_weight, norm_bias)
    check_tensor("linear_weight", linear_weight)
    shape = (*linear_weight.shape[:1], x.shape[-1])
    check_shape("linear_weight", linear_weight, shape, "columns for the last dimension of x")
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias)
        check_shape("linear_bias", linear_bias, shape[:1], "the rows of linear_weight")
    (y,), s, *_ = normed(terms, weights, eps, prenorm=prenorm)
    dtype = autocast_dtype(y)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    out = F.linear(y.to(dtype), linear_weight.to(dtype), bias)
    return (out, s) if prenorm else out


def _refuse_rms_norm(is_rms_norm: bool) -> None:
    if is_rms_norm:
        raise NotImplementedError("is_rms_norm is not supported: gptkernels has no RMSNorm")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm of x (..., C), as `flash_attn.ops.layer_norm.layer_norm`; weight and bias are (C,).
    Raises TypeError, ValueError."""
    return normed(Terms(x), affines(x, weight, bias), epsilon).ys[0]


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """LayerNorm of a residual sum, as `flash_attn.ops.layer_norm.dropout_add_layer_norm`.

        s = dropout(x0 * rowscale * layerscale) + residual, rounded to its dtype
        y = LayerNorm(s) * weight + bias

    Args:
        x0: Input (..., C), float32, bfloat16 or float16.
        residual: (..., C) or None. s has its dtype.
        weight, bias: (C,); bias may be None.
        dropout_p: Probability of dropping an element of x0; 0.0 outside training.
        epsilon: Number added to the variance.
        rowscale: (...) or None, a factor for each row of x0.
        layerscale: (C,) or None, a factor for each column of x0.
        prenorm: Whether to return s too.
        residual_in_fp32: Whether s is float32 where there is no residual; else it has x0's dtype.
        return_dropout_mask: Whether to return the mask too, uint8, 1 where an element is kept.

    Returns:
        y in x0's dtype; then s if prenorm; then the mask with return_dropout_mask. A tuple where
        there is more than y.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device or range is wrong.

    Differentiable once in every tensor; flash-attn gives rowscale no gradient.
    """
    terms = Terms(x0, residual, None, rowscale, layerscale, dropout_p, residual_in_fp32)
    weights = affines(x0, weight, bias)
    (y,), s, kept, _ = normed(terms, weights, epsilon, prenorm=prenorm, mask=return_dropout_mask)
    found = [y, *([s] if prenorm else [])]
    if return_dropout_mask:
        found.append(_bytes(kept, x0))
    return tuple(found) if len(found) > 1 else y


def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """Two LayerNorms of a residual sum, as
    `flash_attn.ops.layer_norm.dropout_add_layer_norm_parallel_residual`.

        s = dropout(x0) + dropout(x1) + residual, rounded to its dtype
        y0 = LayerNorm(s) * weight0 + bias0,   y1 = LayerNorm(s) * weight1 + bias1

    Args:
        x0, x1: Inputs (..., C), each with a mask of its own; x1 may be None.
        residual: (..., C) or None. s has its dtype.
        weight0, bias0, weight1, bias1: (C,); all but weight0 may be None, but bias1 not
            without weight1.
        dropout_p, epsilon, prenorm, residual_in_fp32: As for `dropout_add_layer_norm`.
        return_dropout_mask: Whether to return the two masks too, uint8, 1 where an element is kept.

    Returns:
        y0 and y1, which is None without weight1; then s if prenorm; then the masks of x0 and of x1
        with return_dropout_mask.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device or range is wrong.

    Differentiable once in every tensor.
    """
    weights = affines(x0, weight0, bias0, weight1, bias1)
    terms = Terms(x0, residual, x1, None, None, dropout_p, residual_in_fp32)
    ys, s, *kept = normed(terms, weights, epsilon, prenorm=prenorm, mask=return_dropout_mask)
    found = [*ys, *([None] if weight1 is None else []), *([s] if prenorm else [])]
    return (*found, *(_bytes(mask, x0) for mask in kept if return_dropout_mask))


def _bytes(kept: Tensor | None, x: Tensor) -> Tensor:
    """A mask as uint8; ones where nothing was dropped."""
    if kept is None:
        return torch.ones(x.shape, dtype=torch.uint8, device=x.device)
    return kept.to(torch.uint8)


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with a weight and a bias of its own, as
    `flash_attn.ops.layer_norm.DropoutAddLayerNorm`; it drops in training only. Raises TypeError,
    ValueError for a `p` that is no probability."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        self.prenorm, self.p, self.eps = prenorm, p, eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """y, or (y, s) with prenorm, of x0 (..., C) and a residual of its shape."""
        return dropout_add_layer_norm(
            x0, residual, self.weight, self.bias, self.p if self.training else 0.0, self.eps,
            prenorm=self.prenorm, residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip
