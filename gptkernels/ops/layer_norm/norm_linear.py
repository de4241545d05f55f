"""`norm_linear`: a linear layer that does not keep its input, the output y of a LayerNorm.

    y = LN(s) * norm_weight + norm_bias        `layer_norm` has computed it before
    z = y w^T + b

LayerNorm keeps s anyway. So this layer keeps s instead of y, and its backward pass computes y from
s again: one more LayerNorm saves the memory of y (M, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.autograd import apply, once_differentiable
from gptkernels.core.choice import choose
from gptkernels.core.products import linear, mm
from gptkernels.ops.layer_norm.op import layer_norm_fwd


class _NormLinear(torch.autograd.Function):
    """Autograd for norm_linear: returns z (M, N) of y (M, C), w (N, C) and b (N,). All have one
    dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        w: Tensor,
        b: Tensor | None,
        s: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(w, *((s, norm_weight, norm_bias) if ctx.needs_input_grad[1] else ()))
        ctx.options = (eps, impl)
        return linear(y, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Any], dz: Tensor) -> tuple[Tensor | None, ...]:
        w, *source = saved
        eps, impl = ctx.options
        need_y, need_w, need_b, *_ = ctx.needs_input_grad
        dy = dw = db = None
        # The same products as in F.linear's own backward pass, so the sums have the same order.
        with without_autocast(dz):
            if need_y:
                dy = mm(dz, w)
            if need_w:
                y, *_ = layer_norm_fwd(*source, None, None, 0.0, eps, None, impl)
                dw = mm(dz.t(), y.to(dz.dtype).view(-1, w.shape[1]))
            if need_b:
                db = dz.sum(0)
        return dy, dw, db, *(None,) * 5


def norm_linear(
    y: Tensor,
    w: Tensor,
    b: Tensor | None,
    *,
    source: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Returns F.linear(y, w, b) for y = layer_norm(source, norm_weight, norm_bias), without keeping
    y for the backward pass.

    Args:
        y: (..., C), the output of `gptkernels.layer_norm`.
        w: Weight (N, C), as in nn.Linear(C, N).
        b: Bias (N,), or None.
        source: (..., C), the s whose LayerNorm y is. `gptkernels.layer_norm` returns it with
            prenorm=True.
        norm_weight, norm_bias, eps, impl: The arguments that y was computed with.

    Returns:
        z (..., N). Under autocast y, w and b are first converted to autocast's dtype, as F.linear
        does.

    Differentiable once in y, w and b; source, norm_weight and norm_bias get their gradients through
    y. Nothing checks that y is the LayerNorm of source.
    """
    dtype = autocast_dtype(y)
    rows = y.reshape(-1, y.shape[-1]).to(dtype)
    bias = None if b is None else b.to(dtype)
    norm = (source, norm_weight, norm_bias, float(eps), choose(impl, source))
    z = apply(_NormLinear, rows, w.to(dtype), bias, *norm)
    return z.view(*y.shape[:-1], w.shape[0])
