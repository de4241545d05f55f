"""PyTorch's matrix products, with every NaN kept in the row that has it.

On CPUs with AMX, oneDNN 3.12 and older read past the end of a row of `a` whose length is not a
multiple of 32 16-bit numbers: a NaN in one row reaches the row before it (oneDNN issue 5717).
Zeros up to the next multiple keep it out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DEPTH = 32  # 16-bit numbers in a row of an AMX tile


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x (M, K) w^T (N, K) + b (N,)."""
    missing = _missing(x)
    if missing:
        x, w = F.pad(x, (0, missing)), F.pad(w, (0, missing))
    return F.linear(x, w, b)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) b (K, N)."""
    missing = _missing(a)
    if missing:
        a, b = F.pad(a, (0, missing)), F.pad(b, (0, 0, 0, missing))
    return torch.mm(a, b)


def _missing(a: Tensor) -> int:
    """Columns to add to a (M, K)."""
    if a.device.type != "cpu" or a.dtype == torch.float32 or not torch.cpu._is_amx_tile_supported():
        return 0
    return -a.shape[1] % _DEPTH
