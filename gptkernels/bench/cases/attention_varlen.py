"""Speed of `gptkernels.attention_varlen` against what PyTorch has for a ragged batch.

The baseline is F.scaled_dot_product_attention of one sequence after the other. Beside the peers
stands SDPA of the batch padded to its longest and back (within its time). All get the same packed
tensors and give packed ones. Operations as in `cases.attention`, of the pairs that are there
without padding; bytes, in tensors:

    forward                read q, k, v; write out
    + backward             read dout, q, k, v, out; write dq, dk, dv

Checked are the last queries of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.case import BOTH, FORWARD, Case
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.workload import Function, Part, Workload, normal
from gptkernels.bench.peers import attention_varlen as others
from gptkernels.truth import baseline, reference

_CHECKED = 64  # queries


@dataclass(frozen=True)
class Shape:
    """Causal self-attention of sequences laid end to end."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    padded: bool = True  # whether the padded batch fits

    def __str__(self) -> str:
        tokens = f"{len(self.lengths)} of T{min(self.lengths)}-{max(self.lengths)}"
        return f"{tokens} ({sum(self.lengths)}) H{self.heads}/{self.key_heads} D{self.head_dim}"


def _evenly(count: int, longest: int) -> tuple[int, ...]:
    return tuple(longest * (b + 1) // count for b in range(count))


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """Short documents with GPT-2's heads; long ones with 32 query heads on 8 key heads; a long
    document among many short ones, whose padded batch fits on no GPU."""
    if device_type == "cuda":
        found = [
            Shape(_evenly(32, 1024), 12, 12, 64),
            Shape(_evenly(8, 8192), 32, 8, 128),
            Shape((64,) * 200 + (16384,) + (64,) * 200, 16, 16, 128, padded=False),
        ]
    else:
        found = [Shape(_evenly(4, 256), 8, 2, 64), Shape(_evenly(8, 512), 12, 12, 64)]
    return found[:1] if level == "quick" else found


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """Both directions."""
    H, Hk, D, total = shape.heads, shape.key_heads, shape.head_dim, sum(shape.lengths)
    draw = normal(device, dtype)
    tensors = (draw(total, H, D), draw(total, Hk, D), draw(total, Hk, D))
    ends = torch.tensor([0, *shape.lengths], device=device).cumsum(0).int()
    longest = max(shape.lengths)
    moved = 2 * (H + Hk) * total * D * dtype.itemsize
    product = 2 * H * sum(length * length / 2 for length in shape.lengths) * D
    packed = (ends, ends, longest, longest)

    def ours(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Any:
        return gptkernels.attention_varlen(q, k, v, *packed, impl=impl)

    def peers(backward: bool, repeated: bool) -> Mapping[str, Callable[[], Function]]:
        found = others.peers(device, dtype, H, Hk, ends, longest, backward=backward)
        return found | {"SDPA, padded": lambda: _padded(shape, ends)} if shape.padded else found

    yield from Workload(
        shape=str(shape),
        sizes={"B": len(shape.lengths), "T": longest, "H": H, "Hk": Hk, "D": D},
        series="causal",
        tensors=tensors,
        plain=_one_by_one(shape),
        ours=ours,
        work={FORWARD: (moved, round(2 * product)), BOTH: (3 * moved, round(7 * product))},
        peers=peers,
        part=_part(*tensors, shape.lengths),
    ).cases("attention_varlen", impls)


def _part(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Part:
    """The last queries of the longest sequence."""
    longest = max(lengths)
    begins = sum(lengths[: lengths.index(longest)])
    sequence = slice(begins, begins + longest)
    n = min(_CHECKED, longest)

    def last(x: Tensor) -> Tensor:
        return x[sequence][-n:]

    def of_own(x: Tensor) -> Tensor:
        return x[-n:]

    def dense(attention: Function) -> Function:
        return lambda *tensors: attention(*(x[None] for x in tensors))[0]

    return Part(
        tensors=(last(q), k[sequence], v[sequence]),
        truth=dense(reference.attention),
        yardstick=dense(baseline.attention),
        of_output=last,
        of_gradient=(last, last, last),
        of_own=(of_own, of_own, of_own),
    )


def _one_by_one(shape: Shape) -> Callable[..., Tensor]:
    def attention(*tensors: Tensor) -> Tensor:
        sequences = zip(*(x.split(shape.lengths) for x in tensors), strict=True)
        return torch.cat([baseline.attention(*(x[None] for x in s))[0] for s in sequences])

    return attention


def _padded(shape: Shape, ends: Tensor) -> Callable[..., Tensor]:
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
