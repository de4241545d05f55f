"""Launchers of the GELU MLP's CUDA C++ kernels, the matrix products of csrc/gelu_mlp.

`build` is an index into the compiled module's gelu_mlp_builds(), the builds for Hopper; every
product of the call uses it. With -1 the rule of csrc/gelu_mlp/choice.cpp chooses for each product.
RuntimeError is raised where the given build cannot compute one of the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core import native
from gptkernels.ops.gelu_mlp import torch as plain

_FORWARD, _BACKWARD, _WEIGHT = 0, 1, 2  # the values of gk::Layout
_MADE, _PARTIALS = "gelu_mlp_product", "gelu_mlp_product_partials"


def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C) and h (M, F), which is empty unless `keep_h`. Inputs have a last stride of
    1."""
    if not (x.numel() and w1.numel()):  # there is nothing to fuse
        return plain.gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, keep_h)
    a = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
    h = torch.empty_like(a) if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)
    y = torch.empty((x.shape[0], w2.shape[0]), dtype=x.dtype, device=x.device)
    linear_fwd(x, w1, b1, out=h, activation=a, approximate=approximate, build=build)
    linear_fwd(a, w2, b2, out=y, build=build)
    return y, h


def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dw1, db1, dw2 and db2, each empty where `grad_mask` is False. If h is None, it is
    recomputed."""
    if not (x.numel() and w1.numel()):
        return plain.gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, grad_mask)
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five distinct tensors: the outputs of an op must not be one tensor, even if it is empty.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    dy = dy if dy.stride(1) == 1 or dy.shape[1] == 1 else dy.contiguous()
    if need_b2:
        db2 = torch.empty(dy.shape[1], dtype=dy.dtype, device=dy.device)
        column_sums(dy, out=db2)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    if h is None:
        h = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
        linear_fwd(x, w1, b1, out=h, build=build)
    dh, a, partial = linear_gelu_bwd(dy, w2, h, approximate, need_w2, need_b1, build=build)
    if need_b1:
        db1 = torch.empty(w1.shape[0], dtype=dy.dtype, device=dy.device)
        partial_sums(partial, out=db1)
    if need_w2:
        dw2 = weight_grad(dy, a, build=build)
    if need_w1:
        dw1 = weight_grad(dh, x, build=build)
    if need_x:
        dx = torch.empty((x.shape[0], w1.shape[1]), dtype=x.dtype, device=x.device)
        linear_bwd(dh, w1, out=dx, build=build)
    return dx, dw1, db1, dw2, db2


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
    _product(
        _MADE, _FORWARD, a, b, bias=bias, out=out, activation=activation,
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
    _product(
        _MADE, _BACKWARD, a, b, h=h, addend=addend, out=out, activation=activation,
        partial=partial, total=total, approximate=approximate, build=build,
    )  # fmt: skip


def linear_gelu_bwd(
    dy: Tensor,
    w2: Tensor,
    h: Tensor,
    approximate: str,
    store_a: bool,
    sum_columns: bool,
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dh (M, F); a = gelu(h) (M, F), empty unless `store_a`; and partial column sums of dh
    (tiles, F) in fp32, empty unless `sum_columns`."""
    rows, inner = dy.shape[0], w2.shape[1]
    dh = torch.empty((rows, inner), dtype=dy.dtype, device=dy.device)
    a = torch.empty((rows, inner) if store_a else (0,), dtype=dy.dtype, device=dy.device)
    partials = (
        _product(_PARTIALS, _BACKWARD, dy, w2, h=h, out=dh, activation=a, build=build)
        if sum_columns
        else 0
    )
    partial = torch.empty((partials, inner), dtype=torch.float32, device=dy.device)
    linear_bwd(
        dy,
        w2,
        out=dh,
        h=h,
        activation=a,
        partial=partial,
        approximate=approximate,
        build=build,
    )
    return dh, a, partial


def weight_grad(a: Tensor, b: Tensor, *, out: Tensor | None = None, build: int = -1) -> Tensor:
    """Returns a^T b (m, n) of a (k, m) and b (k, n): contiguous, in `out` if that is given."""
    rows, cols = a.shape[1], b.shape[1]
    splits = _product(_PARTIALS, _WEIGHT, a, b, build=build)
    if out is None:
        out = torch.empty((rows, cols), dtype=a.dtype, device=a.device)
    if splits == 1:
        _product(_MADE, _WEIGHT, a, b, out=out, build=build)
        return out
    partial = torch.empty((splits, rows * cols), dtype=torch.float32, device=a.device)
    _product(_MADE, _WEIGHT, a, b, partial=partial, splits=splits, build=build)
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


def _product(
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

    _MADE computes the product. _PARTIALS returns the number of rows that `partial` must have. For a
    weight's gradient 1 means that there is no `partial`: the product goes to `out`.
    """
    rows, depth = a.T.shape if layout == _WEIGHT else a.shape
    return native.call(
        function,
        a,
        inputs=dict(a=a, b=b, bias=bias, h=h, addend=addend),
        outputs=dict(out=out, activation=activation, partial=partial, total=total),
        dtype=native.dtype_code(a.dtype),
        layout=layout,
        m=rows,
        n=b.shape[0 if layout == _FORWARD else 1],
        k=depth,
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        splits=splits,
        tanh=approximate == "tanh",
        build=build,
    )
