"""`norm_linear`: a linear layer of LayerNorm's output that does not keep that output.

    y = LN(s) * norm_weight + norm_bias        computed before, by `layer_norm`
    z = y w^T + b

Keeps s, which LayerNorm keeps anyway, instead of y, and computes y from it again in the backward
pass: (M, C) less memory for one more LayerNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.choice import choose
from gptkernels.core.products import linear, mm
from gptkernels.ops.layer_norm.op import layer_norm_fwd


class _NormLinear(torch.autograd.Function):
    """z (M, N) of y (M, C), w (N, C) and b (N,), of one dtype."""

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
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        w, *source = ctx.saved_tensors
        eps, impl = ctx.options
        need_y, need_w, need_b, *_ = ctx.needs_input_grad
        dy = dw = db = None
        # The products that F.linear's own backward pass makes, in the same order of sums.
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
    """F.linear(y, w, b) for y = layer_norm(source, norm_weight, norm_bias), without keeping y.

    Args:
        y: (..., C), what `gptkernels.layer_norm` returned.
        w: (N, C) and b: (N,) or None, as in nn.Linear(C, N).
        source: (..., C), the s that y is the norm of: with prenorm=True it is returned beside y.
        norm_weight, norm_bias, eps, impl: what y was computed with.

    Returns z (..., N). Under autocast y, w and b are converted first, as F.linear does.

    Differentiable once in y, w and b; source, norm_weight and norm_bias get their gradients through
    y. That y is what it is said to be is not checked.
    """
    dtype = autocast_dtype(y)
    rows = y.reshape(-1, y.shape[-1]).to(dtype)
    bias = None if b is None else b.to(dtype)
    norm = (
        source.detach(),
        norm_weight.detach(),
        None if norm_bias is None else norm_bias.detach(),
    )
    z = _NormLinear.apply(rows, w.to(dtype), bias, *norm, float(eps), choose(impl, source))
    return z.view(*y.shape[:-1], w.shape[0])
