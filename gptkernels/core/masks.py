"""Dropout's keep masks as tensors, for implementations made of PyTorch's operators.

`core.philox` defines them. On a CPU a kernel computes the same bits in one pass, where PyTorch's
operators take a hundred. The truth uses the definition alone.

torch.compile gets an op of its own for a mask on a CPU: Inductor's C++ would multiply 64-bit
numbers as signed ones, whose overflow C++ leaves undefined. Elsewhere it traces the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
    compute = _attention_op if _compiled_for_cpu(rng) else _attention_keep
    return compute(rng, dropout_p, batch, heads, rows, cols, first_row, first_batch)


def elementwise_keep(rng: Tensor | None, dropout_p: float, shape: Sequence[int]) -> Tensor:
    """Returns philox.elementwise_keep of the same arguments."""
    compute = _elementwise_op if _compiled_for_cpu(rng) else _elementwise_keep
    return compute(rng, dropout_p, shape)


def _attention_keep(
    rng: Tensor | None,
    dropout_p: float,
    batch: int,
    heads: int,
    rows: int,
    cols: int,
    first_row: int,
    first_batch: int,
) -> Tensor:
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


def _elementwise_keep(rng: Tensor | None, dropout_p: float, shape: Sequence[int]) -> Tensor:
    if rng is None or not _native(rng):
        return philox.elementwise_keep(rng, dropout_p, tuple(shape))
    keep = torch.empty(shape, dtype=torch.bool)
    if keep.numel():
        cpu.module().elementwise_keep(
            rng.data_ptr(), philox.threshold(dropout_p), keep.data_ptr(), keep.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
    return keep


def _native(rng: Tensor) -> bool:
    return rng.device.type == "cpu" and direct((rng,)) and cpu.unavailable("cpu") is None


def _compiled_for_cpu(rng: Tensor | None) -> bool:
    return torch.compiler.is_compiling() and rng is not None and rng.device.type == "cpu"


_op = functools.partial(torch.library.custom_op, mutates_args=())
_attention_op = _op("gptkernels::attention_keep")(_attention_keep)
_elementwise_op = _op("gptkernels::elementwise_keep")(_elementwise_keep)


@_attention_op.register_fake
def _(rng: Tensor, dropout_p: float, *sizes: int) -> Tensor:
    return rng.new_empty(sizes[:4], dtype=torch.bool)


@_elementwise_op.register_fake
def _(rng: Tensor, dropout_p: float, shape: Sequence[int]) -> Tensor:
    return rng.new_empty(shape, dtype=torch.bool)
