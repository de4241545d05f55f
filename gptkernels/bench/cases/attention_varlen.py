"""Speed of `gptkernels.attention_varlen` against what PyTorch has for a ragged batch.

Each shape stands beside F.scaled_dot_product_attention of one sequence after the other, of the
batch padded to its longest and back (within its time), and, on a GPU, of jagged nested tensors. All
get the same packed tensors and give packed ones. Operations as in `cases.attention`, of the pairs
that are there without padding; bytes, in tensors:

    forward                read q, k, v; write out
    + backward             read dout, q, k, v, out; write dq, dk, dv
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench.cases.workload import BOTH, FORWARD, Workload, normal
from gptkernels.truth import baseline


@dataclass(frozen=True)
class _Shape:
    """Causal self-attention of sequences laid end to end."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    rivals: tuple[str, ...] = ("one by one", "padded", "nested")

    def __str__(self) -> str:
        tokens = f"{len(self.lengths)} of T{min(self.lengths)}-{max(self.lengths)}"
        return f"{tokens} ({sum(self.lengths)}) H{self.heads}/{self.key_heads} D{self.head_dim}"


def _evenly(count: int, longest: int) -> tuple[int, ...]:
    return tuple(longest * (b + 1) // count for b in range(count))


# Short documents with GPT-2's heads; long ones with 32 query heads on 8 key heads; a long document
# among many short ones, whose padded batch fits on no GPU.
GPU_SHAPES = (
    _Shape(_evenly(32, 1024), 12, 12, 64),
    _Shape(_evenly(8, 8192), 32, 8, 128),
    _Shape((64,) * 200 + (16384,) + (64,) * 200, 16, 16, 128, ("one by one", "nested")),
)
CPU_SHAPES = (_Shape(_evenly(4, 256), 8, 2, 64), _Shape(_evenly(8, 512), 12, 12, 64))
GPU_DTYPES = (torch.bfloat16,)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: _Shape, dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """One beside each rival, the first one only if `quick`."""
    H, Hk, D, total = shape.heads, shape.key_heads, shape.head_dim, sum(shape.lengths)
    draw = normal(device, dtype)
    tensors = (draw(total, H, D), draw(total, Hk, D), draw(total, Hk, D))
    ends = torch.tensor([0, *shape.lengths], device=device).cumsum(0).int()
    longest = max(shape.lengths)
    moved = 2 * (H + Hk) * total * D * dtype.itemsize
    product = 2 * H * sum(length * length / 2 for length in shape.lengths) * D
    made = {"one by one": _one_by_one, "padded": _padded, "nested": _nested}
    for rival in shape.rivals[: 1 if quick else None]:
        if rival == "nested" and device.type != "cuda":  # PyTorch's has no causal kernel for CPUs
            continue
        yield Workload(
            shape=f"{shape}, PyTorch {rival}",
            tensors=tensors,
            plain=made[rival](shape, ends),
            ours=lambda q, k, v, impl: gptkernels.attention_varlen(
                q, k, v, ends, ends, longest, longest, impl=impl
            ),
            work={FORWARD: (moved, round(2 * product)), BOTH: (3 * moved, round(7 * product))},
        )


def _one_by_one(shape: _Shape, ends: Tensor) -> Callable[..., Tensor]:
    def attention(*tensors: Tensor) -> Tensor:
        sequences = zip(*(x.split(shape.lengths) for x in tensors), strict=True)
        return torch.cat([baseline.attention(*(x[None] for x in s))[0] for s in sequences])

    return attention


def _padded(shape: _Shape, ends: Tensor) -> Callable[..., Tensor]:
    """Padding stands behind the tokens of a sequence, where causal attention sees none of it."""
    B, longest = len(shape.lengths), max(shape.lengths)
    places = torch.cat(
        [b * longest + torch.arange(length) for b, length in enumerate(shape.lengths)]
    ).to(ends.device)

    def attention(*tensors: Tensor) -> Tensor:
        batch = (
            x.new_zeros(B * longest, *x.shape[1:]).index_copy(0, places, x).unflatten(0, (B, -1))
            for x in tensors
        )
        out: Any = baseline.attention(*batch)
        return out.flatten(0, 1).index_select(0, places)

    return attention


def _nested(shape: _Shape, ends: Tensor) -> Callable[..., Tensor]:
    """Nested tensors take as many key heads as query heads."""
    group, offsets = shape.heads // shape.key_heads, ends.long()
    bounds: dict[str, Any] = dict(min_seqlen=min(shape.lengths), max_seqlen=max(shape.lengths))

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, offsets, **bounds).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(nested(q), nested(k), nested(v), is_causal=True)
        return out.transpose(1, 2).values()

    return attention
