"""Attention of packed sequences, one sequence after the other.

The host reads the lengths; on a GPU it has to wait for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import dense as one


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Returns out (1, total_q, H, D) and lse (1, H, total_q) in fp32; the formula is that of
    `gptkernels.truth.reference.attention_varlen`."""
    # The lengths are not checked on a GPU, so some queries may belong to no sequence: out is 0.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full((1, q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32)
    for b, rows, keys in _sequences(options):
        out[:, rows], lse[:, :, rows] = one.attention_fwd(
            q[:, rows], k[:, keys], v[:, keys], _of_one(options), b
        )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, each empty where `grad_mask` is False; the fourth tensor, the mask's
    gradient, is always empty."""
    dq, dk, dv = (
        torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v), grad_mask, strict=False)
    )
    for b, rows, keys in _sequences(options):
        *parts, _ = one.attention_bwd(
            dout[:, rows], None if dlse is None else dlse[:, :, rows], q[:, rows], k[:, keys],
            v[:, keys], out[:, rows], lse[:, :, rows].contiguous(), _of_one(options), grad_mask,
            deterministic, b,
        )  # fmt: skip
        for gradient, part, place, wanted in zip(
            (dq, dk, dv), parts, (rows, keys, keys), grad_mask, strict=False
        ):
            if wanted:
                gradient[:, place] = part
    return dq, dk, dv, q.new_empty(0)


def _of_one(options: AttentionOptions) -> AttentionOptions:
    """Returns the options for one sequence by itself."""
    return options._replace(cu_seqlens_q=None, cu_seqlens_k=None)


def _sequences(options: AttentionOptions) -> Iterator[tuple[int, slice, slice]]:
    """Yields (number, queries, keys) of each sequence that has queries or keys."""
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    ends = zip(options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist(), strict=True)
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        if q1 > q0 or k1 > k0:
            yield b, slice(q0, q1), slice(k0, k1)
