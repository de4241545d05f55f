"""PyTorch's matrix products, changed so that a NaN stays in its row.

On CPUs with AMX, oneDNN 3.12 and older read past the end of a 16-bit row whose length is not a
multiple of 32. A NaN in one row then reaches the row before it (oneDNN issue 5717). These functions
pad such rows with zeros to a multiple of 32.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

_DEPTH = 32  # 16-bit numbers in a row of an AMX tile
# Asked once, since torch.compile cannot trace it. ONEDNN_MAX_CPU_ISA may name a lower instruction
# set; oneDNN ignores a name that it does not know.
_LIMIT = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
_AMX = torch.cpu._is_amx_tile_supported() and (
    "AMX" in _LIMIT or not _LIMIT.startswith(("SSE", "AVX"))
)


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Returns x w^T + b, (M, N), for x (M, K), w (N, K) and b (N,) or None."""
    missing = missing_columns(x)
    if missing:
        x, w = F.pad(x, (0, missing)), F.pad(w, (0, missing))
    return F.linear(x, w, b)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b, (M, N), for a (M, K) and b (K, N)."""
    missing = missing_columns(a)
    if missing:
        a, b = F.pad(a, (0, missing)), F.pad(b, (0, 0, 0, missing))
    return torch.mm(a, b)


def weight_gradient(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Returns dy^T x, (N, K), the gradient of w in x w^T, for dy (M, N) and x (M, K), laid out as
    w (N, K) is: autograd would copy another layout."""
    return mm(dy.t(), x) if w.stride(1) == 1 else mm(x.t(), dy).t()


def missing_columns(a: Tensor) -> int:
    """Returns how many columns of zeros a (M, K) needs."""
    affected = _AMX and a.is_cpu and a.dtype != torch.float32
    return -a.shape[1] % _DEPTH if affected else 0
