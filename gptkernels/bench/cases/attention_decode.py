"""Speed of `gptkernels.attention_decode` against F.scaled_dot_product_attention over the caches.

PyTorch gets the lengths as a mask that is made before, none where every query sees all keys; pages
it has to gather first, within its time. Two products, each of 2 H Tq D operations a key. Bytes:
q and out, and the keys and values of every entry up to its length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.cases.workload import FORWARD, Workload, normal
from gptkernels.truth import baseline


@dataclass(frozen=True)
class _Shape:
    """Sizes of one step of decoding."""

    batch: int
    tokens: int  # keys of the longest entry
    heads: int
    key_heads: int
    head_dim: int
    queries: int = 1
    page: int | None = None
    ragged: bool = False  # lengths from tokens / batch up to tokens

    def __str__(self) -> str:
        sizes = f"B{self.batch} T{self.tokens} H{self.heads}/{self.key_heads} D{self.head_dim}"
        queries = f" Tq{self.queries}" if self.queries > 1 else ""
        pages = f" pages of {self.page}" if self.page is not None else ""
        return sizes + queries + pages + (" ragged" if self.ragged else "")

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.tokens] * self.batch
        return [self.tokens * (b + 1) // self.batch for b in range(self.batch)]


# 64 query heads on 8 key heads: one sequence, longer, a batch, ragged lengths, a paged cache, 8
# new tokens at a time; GPT-2's heads.
GPU_SHAPES = (
    _Shape(1, 8192, 64, 8, 128),
    _Shape(1, 32768, 64, 8, 128),
    _Shape(32, 8192, 64, 8, 128),
    _Shape(64, 8192, 64, 8, 128, ragged=True),
    _Shape(32, 8192, 64, 8, 128, page=64),
    _Shape(32, 8192, 64, 8, 128, queries=8),
    _Shape(64, 1024, 12, 12, 64),
)
CPU_SHAPES = (
    _Shape(4, 512, 8, 2, 64),
    _Shape(4, 512, 8, 2, 64, queries=4, page=16, ragged=True),
    _Shape(1, 1024, 12, 12, 64),
    _Shape(1, 4096, 12, 12, 64),
    _Shape(1, 4096, 12, 4, 64),
    _Shape(1, 16384, 12, 12, 64),
)
GPU_DTYPES = (torch.bfloat16,)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: _Shape, dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """The forward pass, the only one."""
    B, T, H, Hk, D = shape.batch, shape.tokens, shape.heads, shape.key_heads, shape.head_dim
    Tq, page = shape.queries, shape.page
    draw = normal(device, dtype)
    q = draw(B, Tq, H, D)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
    table = None
    if page is None:
        k, v = draw(B, T, Hk, D), draw(B, T, Hk, D)
    else:
        pages = B * (T // page)
        k, v = draw(pages, page, Hk, D), draw(pages, page, Hk, D)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        table = order.to(device=device, dtype=torch.int32).view(B, -1)
    mask = None
    if Tq > 1 or shape.ragged:
        position = lengths[:, None] - Tq + torch.arange(Tq, device=device)
        mask = (torch.arange(T, device=device) <= position[..., None])[:, None]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = (x if table is None else x[table].flatten(1, 2) for x in (k, v))
        return baseline.attention(q, keys, values, causal=False, attn_mask=mask)

    keys = sum(shape.lengths)
    moved = (2 * B * Tq * H + 2 * keys * Hk) * D * dtype.itemsize
    yield Workload(
        shape=str(shape),
        tensors=(q, k, v),
        plain=plain,
        ours=functools.partial(
            gptkernels.attention_decode, cache_lengths=lengths, block_table=table
        ),
        work={FORWARD: (moved, 4 * keys * H * Tq * D)},
    )
