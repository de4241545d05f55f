"""Launchers of the CUDA C++ matrix products that several ops share, and of sums over their results
(csrc/gelu_mlp).

`build` is an index into the compiled module's gelu_mlp_builds(), the builds for Hopper. With -1 the
rule of csrc/gelu_mlp/choice.cpp chooses. RuntimeError is raised where the given build cannot
compute the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import native

FORWARD, BACKWARD, WEIGHT = 0, 1, 2  # the values of gk::Layout
# The module's functions for a product: to compute it, and to ask for the size of its workspace.
MADE, PARTIALS = "gelu_mlp_product", "gelu_mlp_product_partials"


def linear_fwd(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor,
    activation: Tensor | None = None,
    approximate: str = "tanh",
    build: int = -1,
) -> None:
    """Computes a (m, k) times the transpose of b (n, k), plus bias. Writes it to `out` unless that
    is empty, and its GELU to `activation` if that is given."""
    product(
        MADE, FORWARD, a, b, bias=bias, out=out, activation=activation,
        approximate=approximate, build=build,
    )  # fmt: skip


def linear_bwd(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor | None = None,
    h: Tensor | None = None,
    activation: Tensor | None = None,
    partial: Tensor | None = None,
    addend: Tensor | None = None,
    total: Tensor | None = None,
    approximate: str = "tanh",
    build: int = -1,
) -> None:
    """Computes out = a (m, k) b (k, n). With h (m, n) it multiplies out by gelu'(h), and writes
    gelu(h) to `activation` and the column sums of out in each tile of rows to `partial`. In place
    of out it computes, without h, total = a b in fp32, plus `addend` if that is given."""
    product(
        MADE, BACKWARD, a, b, h=h, addend=addend, out=out, activation=activation,
        partial=partial, total=total, approximate=approximate, build=build,
    )  # fmt: skip


def weight_grad(a: Tensor, b: Tensor, *, out: Tensor | None = None, build: int = -1) -> Tensor:
    """Returns a^T b (m, n) of a (k, m) and b (k, n): contiguous, in `out` if that is given."""
    rows, cols = a.shape[1], b.shape[1]
    splits = product(PARTIALS, WEIGHT, a, b, build=build)
    if out is None:
        out = torch.empty((rows, cols), dtype=a.dtype, device=a.device)
    if splits == 1:
        product(MADE, WEIGHT, a, b, out=out, build=build)
        return out
    partial = torch.empty((splits, rows * cols), dtype=torch.float32, device=a.device)
    product(MADE, WEIGHT, a, b, partial=partial, splits=splits, build=build)
    partial_sums(partial, out=out.view(-1))
    return out


def column_sums(x: Tensor, *, out: Tensor) -> None:
    """Writes the sums of x (rows, cols) over its rows to out (cols,)."""
    rows, cols = x.shape
    parts = native.module().gelu_mlp_column_sum_parts(rows)
    partial = torch.empty((parts, cols), dtype=torch.float32, device=x.device)
    native.call(
        "gelu_mlp_column_sums",
        x,
        inputs={"x": x},
        outputs={"partial": partial},
        dtype=native.dtype_code(x.dtype),
        rows=rows,
        cols=cols,
        stride=x.stride(0),
    )
    partial_sums(partial, out=out)


def partial_sums(partial: Tensor, *, out: Tensor) -> None:
    """Writes the sums of partial (parts, cols) fp32 over the parts, rounded, to out (cols,)."""
    parts, cols = partial.shape
    native.call(
        "gelu_mlp_partial_sums",
        partial,
        inputs={"partial": partial},
        outputs={"out": out},
        dtype=native.dtype_code(out.dtype),
        parts=parts,
        cols=cols,
    )


def product(
    function: str,
    layout: int,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
    activation: Tensor | None = None,
    partial: Tensor | None = None,
    total: Tensor | None = None,
    splits: int = 1,
    approximate: str = "tanh",
    build: int = -1,
) -> int:
    """Calls one of the module's two functions for a product of a and b; `layout` says how they are
    read.

    MADE computes the product. PARTIALS returns the number of rows that `partial` must have. For a
    weight's gradient 1 means that there is no `partial`: the product goes to `out`.
    """
    rows, depth = a.T.shape if layout == WEIGHT else a.shape
    return native.call(
        function,
        a,
        inputs=dict(a=a, b=b, bias=bias, h=h, addend=addend),
        outputs=dict(out=out, activation=activation, partial=partial, total=total),
        dtype=native.dtype_code(a.dtype),
        layout=layout,
        m=rows,
        n=b.shape[0 if layout == FORWARD else 1],
        k=depth,
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        splits=splits,
        tanh=approximate == "tanh",
        build=build,
    )
