"""Linear layers inside the fused layers, where generation calls them: few rows, no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from gptkernels.core import few_rows
from gptkernels.core.autocast import autocast_enabled
from gptkernels.core.autograd import requires_grad
from gptkernels.core.choice import choose
from gptkernels.core.direct import direct
from gptkernels.nn.plain import is_plain


def call_linear(layer: Callable[[Tensor], Tensor], x: Tensor, impl: str) -> Tensor:
    """layer(x) for x (..., K); by the CPU kernel where `layer` is plainly an nn.Linear, x has few
    rows, nothing needs a gradient, and `impl` is, or "auto" picks, "cpu"."""
    if not x.is_cpu or x.numel() > few_rows.MOST_ROWS * x.shape[-1] or autocast_enabled(x):
        return layer(x)
    if not is_plain(layer, nn.Linear):
        return layer(x)
    w, b = layer.weight, cast("Tensor | None", layer.bias)
    tensors = (x, w, b)
    if (
        requires_grad(tensors)
        or not direct(tensors)
        or not w.is_cpu
        or any(t is not None and t.dtype != x.dtype for t in (w, b))
        or x.shape[-1] != w.shape[1]
        or choose(impl, x) != "cpu"
    ):
        return layer(x)
    y = few_rows.linear(x.reshape(-1, x.shape[-1]), w, b)
    return y.view(*x.shape[:-1], w.shape[0])
