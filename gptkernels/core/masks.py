"""Dropout's keep masks as tensors, for implementations made of PyTorch's operators.

`core.philox` defines them. On a CPU a kernel computes the same bits in one pass, where PyTorch's
operators take a hundred. The truth uses the definition alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import cpu, philox
from gptkernels.core.direct import direct


def attention_keep(
    rng: Tensor | None,
    dropout_p: float,
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    first_row: int = 0,
    first_batch: int = 0,
) -> Tensor:
    """Returns philox.attention_keep of the same arguments."""
    if rng is None or not _native(rng):
        sizes = (batch, heads, rows, cols, first_row, first_batch)
        return philox.attention_keep(rng, dropout_p, *sizes)
    keep = torch.empty(batch, heads, rows, cols, dtype=torch.bool)
    if keep.numel():
        cpu.module().attention_keep(
            rng.data_ptr(), philox.threshold(dropout_p), keep.data_ptr(), batch * heads, rows,
            cols, first_row, first_batch * heads, torch.get_num_threads(),
        )  # fmt: skip
    return keep


def elementwise_keep(rng: Tensor | None, dropout_p: float, shape: torch.Size) -> Tensor:
    """Returns philox.elementwise_keep of the same arguments."""
    if rng is None or not _native(rng):
        return philox.elementwise_keep(rng, dropout_p, shape)
    keep = torch.empty(shape, dtype=torch.bool)
    if keep.numel():
        cpu.module().elementwise_keep(
            rng.data_ptr(), philox.threshold(dropout_p), keep.data_ptr(), keep.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
    return keep


def _native(rng: Tensor) -> bool:
    return rng.device.type == "cpu" and direct((rng,)) and cpu.unavailable("cpu") is None
