"""Speed of `gptkernels.attention` against eager PyTorch, F.scaled_dot_product_attention.

PyTorch gets a window as a mask that is made before. Forward is two products, each of 2 B H Tq Tk D
operations, and backward five (the scores once more); a causal mask leaves half of them. Bytes, in
tensors:

    forward                read q, k, v; write out
    + backward             read dout, q, k, v, out; write dq, dk, dv
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import gptkernels
from gptkernels.bench.cases.workload import BOTH, FORWARD, Workload, normal
from gptkernels.truth import baseline


@dataclass(frozen=True)
class _Shape:
    """Sizes of one self-attention and what it sees."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None  # keys to the left

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.key_heads}" if self.key_heads != self.heads else "")
        sees = ("causal" if self.causal else "full") + (
            f" window {self.window}" if self.window else ""
        )
        return f"B{self.batch} T{self.tokens} {heads} D{self.head_dim} {sees}"

    @property
    def pairs(self) -> float:
        """Queries times the keys that each sees, per head of one batch entry."""
        T = self.tokens
        if self.window is not None and self.window < T:
            return (self.window + 1) * (T - self.window / 2)
        return T * T / (2 if self.causal else 1)


# GPT-2's training batch; long sequences with 64 query heads on 8 key heads, then 32 on 8; the same
# with a window; a bidirectional encoder; wide heads.
GPU_SHAPES = (
    _Shape(8, 1024, 12, 12, 64),
    _Shape(2, 4096, 64, 8, 128),
    _Shape(1, 16384, 32, 8, 128),
    _Shape(1, 16384, 32, 8, 128, window=1024),
    _Shape(16, 512, 12, 12, 64, causal=False),
    _Shape(2, 4096, 16, 16, 256),
)
# GPT-2's heads in sequences of several lengths; fewer key heads; wide heads; a window; no causal
# mask.
CPU_SHAPES = (
    _Shape(1, 512, 12, 12, 64),
    _Shape(1, 512, 8, 2, 64, window=64),
    _Shape(1, 64, 12, 12, 64),
    _Shape(1, 256, 12, 12, 64),
    _Shape(1, 1024, 12, 12, 64),
    _Shape(1, 4096, 12, 12, 64),
    _Shape(1, 1024, 12, 4, 64),
    _Shape(1, 1024, 6, 6, 128),
    _Shape(1, 1024, 12, 12, 64, causal=False),
)
GPU_DTYPES = (torch.bfloat16,)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: _Shape, dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """One for each shape."""
    B, T, H, Hk, D = shape.batch, shape.tokens, shape.heads, shape.key_heads, shape.head_dim
    draw = normal(device, dtype)
    sees: dict[str, Any] = {"causal": shape.causal}
    plain_sees = sees
    if shape.window is not None:
        sees = {**sees, "window": (shape.window, 0)}
        plain_sees = {"causal": False, "attn_mask": baseline.band_mask(device, T, T, **sees)}
    moved = 2 * B * T * (H + Hk) * D * dtype.itemsize
    product = 2 * B * H * shape.pairs * D
    yield Workload(
        shape=str(shape),
        tensors=(draw(B, T, H, D), draw(B, T, Hk, D), draw(B, T, Hk, D)),
        plain=functools.partial(baseline.attention, **plain_sees),
        ours=functools.partial(gptkernels.attention, **sees),
        work={FORWARD: (moved, round(2 * product)), BOTH: (3 * moved, round(7 * product))},
    )
