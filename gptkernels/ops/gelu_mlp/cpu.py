"""The GELU MLP with PyTorch's products, those of few rows by a CPU kernel, and GELU in one pass of
another (csrc/cpu/gelu_mlp/params.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core.cpu import DTYPE_CODES, address, module
from gptkernels.core.few_rows import linear
from gptkernels.core.products import mm, weight_gradient


def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C) and h = x w1^T + b1 (M, F), which is empty unless `keep_h`. All tensors have
    one dtype."""
    h = linear(x, w1, b1)
    # Where h is not kept, a takes its place.
    a = gelu(h, torch.empty_like(h) if keep_h else h, approximate)
    return linear(a, w2, b2), h if keep_h else x.new_empty(0)


def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns dx, dw1, db1, dw2 and db2, each empty where `grad_mask` is False. If h is None, it is
    recomputed."""
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    dx = dw1 = db1 = dw2 = db2 = None
    if need_b2:
        db2 = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if need_x or need_w1 or need_b1 or need_w2:
        h = linear(x, w1, b1) if h is None else h.contiguous()
        a = torch.empty_like(h) if need_w2 else None
        if need_x or need_w1 or need_b1:
            da = mm(dy, w2)
            db1 = x.new_zeros(h.shape[1]) if need_b1 else None
            gelu_backward(h, da, da, a, db1, approximate)
            dw1 = weight_gradient(da, x, w1) if need_w1 else None
            dx = mm(da, w1) if need_x else None
        elif a is not None:
            gelu(h, a, approximate)
        dw2 = None if a is None else weight_gradient(dy, a, w2)
    # An empty tensor for each that is not wanted: the outputs of an op must be distinct.
    gradients = (dx, dw1, db1, dw2, db2)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def gelu(h: Tensor, a: Tensor, approximate: str) -> Tensor:
    """Writes gelu(h) to a, which may be h, and returns a. Both are contiguous."""
    if h.numel():
        module().gelu_fwd(
            h.data_ptr(), a.data_ptr(), h.numel(), approximate == "tanh", DTYPE_CODES[h.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
    return a


def gelu_backward(
    h: Tensor, da: Tensor, dh: Tensor, a: Tensor | None, db: Tensor | None, approximate: str
) -> None:
    """Writes da gelu'(h) to dh, which may be da; gelu(h) to a; and the sum of dh's rows to db.
    All are (M, F) and contiguous, db is (F,); without rows db is left as it is."""
    if h.numel():
        module().gelu_bwd(
            h.data_ptr(), da.data_ptr(), dh.data_ptr(), address(a), address(db), *h.shape,
            approximate == "tanh", DTYPE_CODES[h.dtype], torch.get_num_threads(),
        )  # fmt: skip
