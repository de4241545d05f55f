"""GELU MLP in CUDA C++: csrc/mlp.cu's products, with the workspaces that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels import cuda

_BACKWARD, _WEIGHT = 1, 2  # of gk::Layout


def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """y (M, C) and h (M, F), h empty unless `keep_h`. Last strides are 1, no size is 0."""
    a = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
    h = torch.empty_like(a) if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)
    y = torch.empty((x.shape[0], w2.shape[0]), dtype=x.dtype, device=x.device)
    _linear_fwd(x, w1, b1, out=h, activation=a, approximate=approximate)
    _linear_fwd(a, w2, b2, out=y)
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
        _linear_fwd(x, w1, b1, out=h)
    dh, a, partial = _linear_gelu_bwd(dy, w2, h, approximate, need_w2, need_b1)
    if need_b1:
        db1 = _partial_sums(partial, dy.dtype)
    if need_w2:
        dw2 = _weight_grad(dy, a)
    if need_w1:
        dw1 = _weight_grad(dh, x)
    if need_x:
        dx = torch.empty((x.shape[0], w1.shape[1]), dtype=x.dtype, device=x.device)
        _linear_bwd(dh, w1, out=dx)
    return dx, dw1, db1, dw2, db2


def _linear_fwd(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    *,
    out: Tensor,
    activation: Tensor | None = None,
    approximate: str = "tanh",
) -> None:
    """out = a (m, k) b^T (n, k) + bias, unless it is empty; activation = gelu(out)."""
    cuda.call(
        "mlp_linear_fwd",
        a,
        inputs={"a": a, "b": b, "bias": bias},
        outputs={"out": out, "activation": activation},
        **_scalars(a, b, b.shape[0]),
        tanh=approximate == "tanh",
    )


def _linear_bwd(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor,
    h: Tensor | None = None,
    activation: Tensor | None = None,
    partial: Tensor | None = None,
    approximate: str = "tanh",
) -> None:
    """out = a (m, k) b (k, n); with h (m, n) times gelu'(h), gelu(h) into activation, and column
    sums of out for each tile of rows into partial."""
    cuda.call(
        "mlp_linear_bwd",
        a,
        inputs={"a": a, "b": b, "h": h},
        outputs={"out": out, "activation": activation, "partial": partial},
        **_scalars(a, b, b.shape[1]),
        tanh=approximate == "tanh",
    )


def _linear_gelu_bwd(
    dy: Tensor, w2: Tensor, h: Tensor, approximate: str, store_a: bool, sum_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dh (M, F), a (M, F) or empty, partial column sums of dh (tiles, F) fp32 or empty."""
    (rows, width), inner = dy.shape, w2.shape[1]
    tile_rows, _ = cuda.module().mlp_plan(_device(dy), _BACKWARD, rows, inner, width)
    tiles = -(-rows // tile_rows)
    dh = torch.empty((rows, inner), dtype=dy.dtype, device=dy.device)
    a = torch.empty((rows, inner) if store_a else (0,), dtype=dy.dtype, device=dy.device)
    partial = torch.empty(
        (tiles, inner) if sum_columns else (0,), dtype=torch.float32, device=dy.device
    )
    _linear_bwd(dy, w2, out=dh, h=h, activation=a, partial=partial, approximate=approximate)
    return dh, a, partial


def _weight_grad(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (m, n) of a (k, m) and b (k, n)."""
    (depth, rows), cols = a.shape, b.shape[1]
    _, splits = cuda.module().mlp_plan(_device(a), _WEIGHT, rows, cols, depth)
    out = partial = None
    if splits > 1:
        partial = torch.empty((splits, rows * cols), dtype=torch.float32, device=a.device)
    else:
        out = torch.empty((rows, cols), dtype=a.dtype, device=a.device)
    cuda.call(
        "mlp_weight_grad",
        a,
        inputs={"a": a, "b": b},
        outputs={"out": out, "partial": partial},
        dtype=cuda.dtype_code(a.dtype),
        m=rows,
        n=cols,
        k=depth,
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        splits=splits,
    )
    if partial is not None:
        out = _partial_sums(partial, a.dtype).view(rows, cols)
    assert out is not None
    return out


def _column_sums(x: Tensor) -> Tensor:
    """The sums of x (rows, cols) over its rows, (cols,)."""
    rows, cols = x.shape
    parts = -(-rows // cuda.module().mlp_column_sum_rows)
    partial = torch.empty((parts, cols), dtype=torch.float32, device=x.device)
    cuda.call(
        "mlp_column_sums",
        x,
        inputs={"x": x},
        outputs={"partial": partial},
        dtype=cuda.dtype_code(x.dtype),
        rows=rows,
        cols=cols,
        stride=x.stride(0),
    )
    return _partial_sums(partial, x.dtype)


def _partial_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of partial (parts, cols) fp32 over the parts, (cols,), rounded to dtype."""
    parts, cols = partial.shape
    out = torch.empty(cols, dtype=dtype, device=partial.device)
    cuda.call(
        "mlp_partial_sums",
        partial,
        inputs={"partial": partial},
        outputs={"out": out},
        dtype=cuda.dtype_code(dtype),
        parts=parts,
        cols=cols,
    )
    return out


def _scalars(a: Tensor, b: Tensor, cols: int) -> dict[str, int]:
    rows, depth = a.shape
    return {
        "dtype": cuda.dtype_code(a.dtype),
        "m": rows,
        "n": cols,
        "k": depth,
        "a_stride": a.stride(0),
        "b_stride": b.stride(0),
    }


def _device(tensor: Tensor) -> int:
    return max(tensor.get_device(), 0)
