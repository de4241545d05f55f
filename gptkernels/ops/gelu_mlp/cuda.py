"""Launchers of the GELU MLP's CUDA C++ kernels, the matrix products of csrc/gelu_mlp.

`build` is an index into the compiled module's gelu_mlp_builds(), the builds for Hopper; every
product of the call uses it. With -1 the rule of csrc/gelu_mlp/choice.cpp chooses for each product.
RuntimeError is raised where the given build cannot compute one of the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core import cuda_products as products
from gptkernels.ops.gelu_mlp import torch as plain


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
    products.linear_fwd(x, w1, b1, out=h, activation=a, approximate=approximate, build=build)
    products.linear_fwd(a, w2, b2, out=y, build=build)
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
        products.column_sums(dy, out=db2)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    if h is None:
        h = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
        products.linear_fwd(x, w1, b1, out=h, build=build)
    dh, a, partial = linear_gelu_bwd(dy, w2, h, approximate, need_w2, need_b1, build=build)
    if need_b1:
        db1 = torch.empty(w1.shape[0], dtype=dy.dtype, device=dy.device)
        products.partial_sums(partial, out=db1)
    if need_w2:
        dw2 = products.weight_grad(dy, a, build=build)
    if need_w1:
        dw1 = products.weight_grad(dh, x, build=build)
    if need_x:
        dx = torch.empty((x.shape[0], w1.shape[1]), dtype=x.dtype, device=x.device)
        products.linear_bwd(dh, w1, out=dx, build=build)
    return dx, dw1, db1, dw2, db2


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
        products.product(
            products.PARTIALS, products.BACKWARD, dy, w2, h=h, out=dh, activation=a, build=build
        )
        if sum_columns
        else 0
    )
    partial = torch.empty((partials, inner), dtype=torch.float32, device=dy.device)
    products.linear_bwd(
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
