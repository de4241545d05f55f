"""The GELU MLP computed with PyTorch's linear and GELU. It keeps the pre-activation, not the
activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.products import linear, mm, weight_gradient

# Up to this many rows, GELU runs row by row: that costs little beside the products.
_FEW_ROWS = 64


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
    y = linear(_gelu(h, approximate), w2, b2)
    return y, h if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)


def _gelu(h: Tensor, approximate: str) -> Tensor:
    """Returns gelu(h). Where rows are few, as in text generation, a row's bits depend on that row
    alone.

    On a CPU PyTorch cuts the elements among threads, and computes the last ones of each thread by
    other instructions, which round differently. So a few rows are computed one by one. Inductor
    writes its own loop, so under torch.compile GELU is one operator.
    """
    if torch.compiler.is_compiling() or h.device.type != "cpu" or not 1 < len(h) <= _FEW_ROWS:
        return F.gelu(h, approximate=approximate)
    return torch.stack([F.gelu(row, approximate=approximate) for row in h.unbind()])


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
    """Returns dx, dw1, db1, dw2 and db2, each empty where `grad_mask` is False. If h is None, it is
    recomputed."""
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five distinct tensors: the outputs of an op must not be one tensor, even if it is empty.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    if need_b2:
        db2 = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    if h is None:
        h = linear(x, w1, b1)
    if need_w2:
        dw2 = weight_gradient(dy, F.gelu(h, approximate=approximate), w2)
    if need_x or need_w1 or need_b1:
        dh = torch.ops.aten.gelu_backward(mm(dy, w2), h, approximate=approximate)
        if need_b1:
            db1 = dh.sum(0, dtype=torch.float32).to(dh.dtype)
        if need_w1:
            dw1 = weight_gradient(dh, x, w1)
        if need_x:
            dx = mm(dh, w1)
    return dx, dw1, db1, dw2, db2
