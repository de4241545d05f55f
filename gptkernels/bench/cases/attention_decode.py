"""Speed of `gptkernels.attention_decode` against F.scaled_dot_product_attention over the caches.

PyTorch gets the lengths as a mask that is made before, none where every query sees all keys; pages
it has to gather first, within its time. Two products, each of 2 H Tq D operations a key. Bytes:
q and out, and the keys and values of every entry up to its length. Checked is the last batch
entry, the longest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.case import FORWARD, Case
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.workload import Part, Workload, normal
from gptkernels.bench.peers import attention_decode as others
from gptkernels.truth import baseline, reference


@dataclass(frozen=True)
class Shape:
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
        return sizes + queries + self.layout

    @property
    def layout(self) -> str:
        """Of the caches, in words; nothing for full caches of one piece."""
        pages = f" pages of {self.page}" if self.page is not None else ""
        return pages + (" ragged" if self.ragged else "")

    @property
    def lengths(self) -> list[int]:
        """Keys of each entry."""
        if not self.ragged:
            return [self.tokens] * self.batch
        return [self.tokens * (b + 1) // self.batch for b in range(self.batch)]


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """One sequence, longer ones, batches, ragged lengths, a paged cache, several new tokens at a
    time; GPT-2's heads."""
    if device_type == "cuda":
        few = [
            Shape(1, 8192, 64, 8, 128),
            Shape(1, 32768, 64, 8, 128),
            Shape(32, 8192, 64, 8, 128),
            Shape(64, 8192, 64, 8, 128, ragged=True),
            Shape(32, 8192, 64, 8, 128, page=64),
            Shape(32, 8192, 64, 8, 128, queries=8),
            Shape(64, 1024, 12, 12, 64),
        ]
        more = [
            Shape(1, 1024, 64, 8, 128),
            Shape(1, 65536, 64, 8, 128),
            Shape(128, 4096, 64, 8, 128),
            Shape(8, 8192, 64, 8, 128, queries=16),
        ]
    else:
        few = [
            Shape(4, 512, 8, 2, 64),
            Shape(4, 512, 8, 2, 64, queries=4, page=16, ragged=True),
            Shape(1, 1024, 12, 12, 64),
            Shape(1, 4096, 12, 12, 64),
            Shape(1, 4096, 12, 4, 64),
            Shape(1, 16384, 12, 12, 64),
        ]
        more = [
            Shape(1, 65536, 12, 4, 64),
            Shape(8, 1024, 12, 12, 64),
            Shape(128, 1024, 12, 4, 64),
            Shape(1, 4096, 12, 12, 64, queries=16),
            Shape(8, 4096, 32, 4, 128),
        ]
    return {"quick": few[:2], "default": few, "full": few + more}[level]


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
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

    def gathered(caches: Tensor, entries: slice = slice(None)) -> Tensor:
        """The caches of these entries as one piece each."""
        return caches[entries] if table is None else caches[table[entries]].flatten(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Any:
        keys, values = gathered(k), gathered(v)
        return baseline.attention(q, keys, values, causal=False, attn_mask=mask)

    keys = sum(shape.lengths)
    moved = (2 * B * Tq * H + 2 * keys * Hk) * D * dtype.itemsize
    in_cache: dict[str, Any] = {"cache_lengths": lengths, "block_table": table}
    last = slice(B - 1, B)
    of_last: dict[str, Any] = {"cache_lengths": lengths[last]}
    yield from Workload(
        shape=str(shape),
        sizes={"B": B, "T": T, "Tq": Tq, "H": H, "Hk": Hk, "D": D},
        series=shape.layout.strip() or "one piece",
        tensors=(q, k, v),
        plain=plain,
        ours=functools.partial(gptkernels.attention_decode, **in_cache),
        work={FORWARD: (moved, 4 * keys * H * Tq * D)},
        peers=lambda *_: others.peers(
            device, dtype, tuple(q.shape), tuple(k.shape), lengths, block_table=table
        ),
        part=Part(
            tensors=(q[last], gathered(k, last), gathered(v, last)),
            truth=functools.partial(reference.attention_decode, **of_last),
            yardstick=functools.partial(baseline.attention_decode, **of_last),
            of_output=lambda x: x[last],
            of_gradient=(),
            of_own=(),
        ),
    ).cases("attention_decode", impls)
