"""Speed of `gptkernels.attention_varlen` against what PyTorch has for a ragged batch.

Each shape stands beside F.scaled_dot_product_attention of one sequence after the other, of the
batch padded to its longest and back (within its time), and, on a GPU, of jagged nested tensors. All
get the same packed tensors and give packed ones. Operations as in `bench_attention`, of the pairs
that are there without padding; bytes, in tensors:

    forward                read q, k, v; write out
    + backward             read dout, q, k, v, out; write dq, dk, dv
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench.timing import BASELINE, Case, untimeable
from gptkernels.bench.timing import rows as timed_rows
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


# Documents of GPT-2's; of a model of 32 heads on 8, long; one long one among many short, whose
# padded batch no GPU would hold.
_GPU_SHAPES = (
    _Shape(_evenly(32, 1024), 12, 12, 64),
    _Shape(_evenly(8, 8192), 32, 8, 128),
    _Shape((64,) * 200 + (16384,) + (64,) * 200, 16, 16, 128, ("one by one", "nested")),
)
_CPU_SHAPES = (_Shape(_evenly(4, 256), 8, 2, 64),)


def rows(
    device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Timed rows of `cases`, as `timing.rows` describes them."""
    return timed_rows(cases(device, impls, quick), device=device, budget_s=0.3 if quick else 1.0)


def cases(device: torch.device | str, impls: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """Every shape, direction and rival; `quick`: the first shape and rival only."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    shapes = _GPU_SHAPES if on_gpu else _CPU_SHAPES
    for shape in shapes[: 1 if quick else None]:
        for rival in shape.rivals[: 1 if quick else None]:
            if rival == "nested" and not on_gpu:  # PyTorch's has no causal kernel for CPUs
                continue
            dtype = torch.bfloat16 if on_gpu else torch.float32
            for backward in (False, True):
                yield _case(device, impls, shape, rival, dtype, backward=backward)


def _case(
    device: torch.device,
    impls: Sequence[str],
    shape: _Shape,
    rival: str,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> Case:
    H, Hk, D, total = shape.heads, shape.key_heads, shape.head_dim, sum(shape.lengths)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        values = torch.randn(total, heads, D, generator=generator, device=device)
        return values.to(dtype).requires_grad_(backward)

    tensors = (draw(H), draw(Hk), draw(Hk))
    cotangent = draw(H).detach()
    ends = torch.tensor([0, *shape.lengths], device=device).cumsum(0).int()
    longest = max(shape.lengths)

    def call(attention: Callable[..., Any], *given: Any, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            out = attention(*tensors, *given, **options)
            return torch.autograd.grad(out, tensors, cotangent) if backward else out

        return run

    plain = {"one by one": _one_by_one, "padded": _padded, "nested": _nested}[rival]
    candidates = {BASELINE: call(plain(shape, ends))}
    skipped = {}
    for impl in impls:
        reason = untimeable(impl, device, dtype)
        if reason is None:
            candidates[impl] = call(
                gptkernels.attention_varlen, ends, ends, longest, longest, impl=impl
            )
        else:
            skipped[impl] = reason
    pairs = sum(length * length / 2 for length in shape.lengths)
    elements = 2 * (H + Hk) * total * D
    return Case(
        op="attention_varlen",
        shape=f"{shape}, PyTorch {rival}",
        dtype=dtype,
        direction="forward+backward" if backward else "forward",
        candidates=candidates,
        bytes_moved=(3 if backward else 1) * elements * dtype.itemsize,
        flops=round((7 if backward else 2) * 2 * H * pairs * D),
        skipped=skipped,
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
