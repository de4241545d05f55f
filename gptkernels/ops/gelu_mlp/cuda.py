"""GELU MLP in CUDA C++: the products of csrc/gelu_mlp, with the workspaces that they need.

`build` is a kernel for Hopper of module().gelu_mlp_builds(), for every product; -1 leaves the
choice to the rule of csrc/gelu_mlp/choice.cpp. RuntimeError where that kernel cannot make one of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core import native

_FORWARD, _BACKWARD, _WEIGHT = 0, 1, 2  # of gk::Layout
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
    """y (M, C) and h (M, F), h empty unless `keep_h`. Last strides are 1, no size is 0."""
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
    """dx, dw1, db1, dw2, db2, those `grad_mask` asks for, the others empty; h None: rebuilt."""
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five tensors: outputs of an op may not share memory, not even none.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    dy = dy if dy.stride(1) == 1 or dy.shape[1] == 1 else dy.contiguous()
    if need_b2:
        db2 = _column_sums(dy)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    if h is None:
        h = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
        linear_fwd(x, w1, b1, out=h, build=build)
    dh, a, partial = linear_gelu_bwd(dy, w2, h, approximate, need_w2, need_b1, build=build)
    if need_b1:
        db1 = _partial_sums(partial, dy.dtype)
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
    """out = a (m, k) b^T (n, k) + bias, unless it is empty; activation = gelu(out)."""
    _product(
        _MADE, _FORWARD, a, b, bias=bias, out=out, activation=activation,
        approximate=approximate, build=build,
    )  # fmt: skip


def linear_bwd(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor,
    h: Tensor | None = None,
    activation: Tensor | None = None,
    partial: Tensor | None = None,
    approximate: str = "tanh",
    build: int = -1,
) -> None:
    """out = a (m, k) b (k, n); with h (m, n) times gelu'(h), gelu(h) into activation, and column
    sums of out for each tile of rows into partial."""
    _product(
        _MADE, _BACKWARD, a, b, h=h, out=out, activation=activation, partial=partial,
        approximate=approximate, build=build,
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
    """dh (M, F), a (M, F) or empty, partial column sums of dh (tiles, F) fp32 or empty."""
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


def weight_grad(a: Tensor, b: Tensor, *, build: int = -1) -> Tensor:
    """a^T b (m, n) of a (k, m) and b (k, n)."""
    rows, cols = a.shape[1], b.shape[1]
    splits = _product(_PARTIALS, _WEIGHT, a, b, build=build)
    out = partial = None
    if splits > 1:
        partial = torch.empty((splits, rows * cols), dtype=torch.float32, device=a.device)
    else:
        out = torch.empty((rows, cols), dtype=a.dtype, device=a.device)
    _product(_MADE, _WEIGHT, a, b, out=out, partial=partial, splits=splits, build=build)
    if partial is not None:
        out = _partial_sums(partial, a.dtype).view(rows, cols)
    assert out is not None
    return out


def _column_sums(x: Tensor) -> Tensor:
    """The sums of x (rows, cols) over its rows, (cols,)."""
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
    return _partial_sums(partial, x.dtype)


def _partial_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of partial (parts, cols) fp32 over the parts, (cols,), rounded to dtype."""
    parts, cols = partial.shape
    out = torch.empty(cols, dtype=dtype, device=partial.device)
    native.call(
        "gelu_mlp_partial_sums",
        partial,
        inputs={"partial": partial},
        outputs={"out": out},
        dtype=native.dtype_code(dtype),
        parts=parts,
        cols=cols,
    )
    return out


def _product(
    function: str,
    layout: int,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    out: Tensor | None = None,
    activation: Tensor | None = None,
    partial: Tensor | None = None,
    splits: int = 1,
    approximate: str = "tanh",
    build: int = -1,
) -> int:
    """_MADE: the product of a and b, in the layout's way to read them. _PARTIALS: how many rows its
    `partial` has; of a weight's gradient 1 is none, there `out` takes the product.
    """
    rows, depth = a.T.shape if layout == _WEIGHT else a.shape
    return native.call(
        function,
        a,
        inputs=dict(a=a, b=b, bias=bias, h=h),
        outputs=dict(out=out, activation=activation, partial=partial),
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
