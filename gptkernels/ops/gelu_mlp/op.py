"""`gelu_mlp`: linear, GELU, linear as one op. The registered ops, autograd, the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.checks import (
    check_same_device,
    check_shape,
    check_tensor,
    check_unit_last_stride,
)
from gptkernels.core.choice import choose
from gptkernels.core.registry import register


@register("gptkernels.ops.gelu_mlp")
def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y (M, C) of x (M, C), and the pre-activation h (M, F), empty unless `keep_h`."""
    h_shape = (x.shape[0], w1.shape[0]) if keep_h else (0,)
    return x.new_empty(x.shape), x.new_empty(h_shape)


@register("gptkernels.ops.gelu_mlp")
def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2 and db2, empty where `grad_mask` is False; h None: computed again."""
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, grad_mask, strict=True)
    )
    return dx, dw1, db1, dw2, db2


class _GeluMLP(torch.autograd.Function):
    """y (M, C) of x (M, C); all tensors have one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        approximate: str,
        keep_h: bool,
        impl: str,
    ) -> Tensor:
        y, h = gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, keep_h, impl)
        if keep_h:
            ctx.save_for_backward(x, w1, None, w2, h)
        else:
            ctx.save_for_backward(x, w1, b1, w2, None)
        ctx.options = (approximate, impl)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, h = ctx.saved_tensors
        approximate, impl = ctx.options
        grad_mask = list(ctx.needs_input_grad[:5])
        gradients = gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, grad_mask, impl)
        wanted = (
            gradient if want else None for gradient, want in zip(gradients, grad_mask, strict=True)
        )
        return (*wanted, None, None, None)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The feed-forward block of a transformer: y = gelu(x w1^T + b1) w2^T + b2.

    GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016: h Phi(h) ("none"), or its
    approximation 0.5 h (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))) ("tanh", GPT-2's).

    Args:
        x: (..., C), float32, bfloat16 or float16, last stride 1.
        w1: (F, C) as in nn.Linear(C, F), last stride 1. Weights and biases of another of these
            dtypes are converted to x's; their gradients come back in their own.
        b1: (F,) or None.
        w2: (C, F) as in nn.Linear(F, C), last stride 1.
        b2: (C,) or None.
        approximate: "tanh" or "none", as in nn.GELU.
        recompute: keep x and the weights for the backward pass, and compute the pre-activation
            x w1^T + b1 (M, F) there once more; otherwise it is kept as well. The activation is
            never kept.
        impl: "auto", "torch", "triton" or "cuda".

    Returns:
        y with x's shape and dtype. Under autocast, inputs are converted to autocast's dtype first,
        as F.linear does, and y has that dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError, NotImplementedError: an explicit impl cannot run here.

    Differentiable once in x, w1, b1, w2 and b2; gradients have the same bits on every run.
    """
    _check(x, w1, b1, w2, b2, approximate)
    dtype = autocast_dtype(x)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(_rows(x), x.shape[-1])
    rows, w1, w2 = rows.to(dtype), w1.to(dtype), w2.to(dtype)
    b1 = None if b1 is None else b1.to(dtype)
    b2 = None if b2 is None else b2.to(dtype)
    impl = choose(impl, rows)
    if not (rows.numel() and w1.numel()):  # with a zero size there is nothing to fuse
        impl = "torch"
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, w1, b1, w2, b2)
    )
    keep_h = differentiable and not recompute
    return _GeluMLP.apply(rows, w1, b1, w2, b2, approximate, keep_h, impl).view(x.shape)


def _rows(x: Tensor) -> int:
    """M of an empty x (..., C), which a -1 in reshape could not tell where C is 0."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> None:
    tensors = {"x": x, "w1": w1, "w2": w2}
    if b1 is not None:
        tensors["b1"] = b1
    if b2 is not None:
        tensors["b2"] = b2
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        check_same_device(name, tensor, "x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., C), got a tensor without dimensions")
    width = x.shape[-1]
    if w1.dim() != 2 or w1.shape[1] != width:
        raise ValueError(
            f"w1 must have shape (F, {width}), its columns the last dimension of x, "
            f"got {tuple(w1.shape)}"
        )
    inner = w1.shape[0]
    check_shape("w2", w2, (width, inner), "the transposed shape of w1")
    if b1 is not None:
        check_shape("b1", b1, (inner,), "the rows of w1")
    if b2 is not None:
        check_shape("b2", b2, (width,), "the rows of w2")
    for name, tensor in tensors.items():
        check_unit_last_stride(name, tensor)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
