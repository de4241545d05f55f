"""Linear layers inside the fused layers, where generation calls them: few rows, no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from gptkernels.core import few_rows
from gptkernels.core.autocast import autocast_enabled
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import DTYPES
from gptkernels.core.choice import choose
from gptkernels.core.direct import direct
from gptkernels.nn.plain import is_plain


def call_linear(layer: Callable[[Tensor], Tensor], x: Tensor, impl: str) -> Tensor:
    """layer(x) for x (..., K); by the CPU kernel where `layer` is plainly an nn.Linear, x has few
    rows, nothing needs a gradient, and `impl` is, or "auto" picks, "cpu". Raises what layer(x)
    raises."""
    if torch.compiler.is_compiling():  # a question about sizes would be one that the graph asks
        return layer(x)
    if not 0 < x.numel() <= few_rows.MOST_ROWS * x.shape[-1] or not is_plain(layer, nn.Linear):
        return layer(x)
    y = linear_of_few_rows(x, layer.weight, cast("Tensor | None", layer.bias), impl)
    return layer(x) if y is None else y


def linear_of_few_rows(x: Tensor, w: Tensor, b: Tensor | None, impl: str) -> Tensor | None:
    """x w^T + b by the CPU kernel, for x (..., K) with up to MOST_ROWS rows, w (N, K), or the
    transposed view of a (K, N), and b (N,); None where it does not take them."""
    given = [x, w] if b is None else [x, w, b]
    if (
        requires_grad(given)
        or not direct(given)
        or autocast_enabled(x)
        or x.dtype not in DTYPES
        or not all(t.is_cpu and t.dtype == x.dtype and t.layout == torch.strided for t in given)
        or w.shape[1:] != x.shape[-1:]
        or (b is not None and b.shape != w.shape[:1])
        or choose(impl, x) != "cpu"
    ):
        return None
    y = few_rows.linear(x.reshape(-1, x.shape[-1]), w, b)
    return y.view(*x.shape[:-1], w.shape[0])
