"""The GELU MLP by PyTorch's linear and GELU, keeping the pre-activation only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.products import linear, mm

# So many rows cost little one by one: the products beside them take far longer.
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
    """y (M, C) and h = x w1^T + b1 (M, F), h empty unless `keep_h`; all in one dtype."""
    h = linear(x, w1, b1)
    y = linear(_gelu(h, approximate), w2, b2)
    return y, h if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)


def _gelu(h: Tensor, approximate: str) -> Tensor:
    """gelu(h), a row of which depends on its own values alone where rows are few, as when texts
    are continued: on a CPU PyTorch computes the ends of what each thread gets by other instructions
    than the rest, and rounds otherwise there."""
    if h.device.type != "cpu" or not 1 < len(h) <= _FEW_ROWS:
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
    """dx, dw1, db1, dw2, db2, those `grad_mask` asks for, the others empty; h None: rebuilt."""
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five tensors: outputs of an op may not share memory, not even none.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    if need_b2:
        db2 = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    if h is None:
        h = linear(x, w1, b1)
    if need_w2:
        dw2 = mm(dy.t(), F.gelu(h, approximate=approximate))
    if need_x or need_w1 or need_b1:
        dh = torch.ops.aten.gelu_backward(mm(dy, w2), h, approximate=approximate)
        if need_b1:
            db1 = dh.sum(0, dtype=torch.float32).to(dh.dtype)
        if need_w1:
            dw1 = mm(dh.t(), x)
        if need_x:
            dx = mm(dh, w1)
    return dx, dw1, db1, dw2, db2
