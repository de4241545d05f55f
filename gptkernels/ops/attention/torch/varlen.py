"""Attention of sequences of different lengths, one `attention` after the other.

The lengths are read on the host, which on a GPU waits for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptkernels.ops.attention.torch import dense as one


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    rng: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (total_q, H, D) and lse (H, total_q) fp32; see `reference.attention_varlen`."""
    # On a GPU nobody has looked whether the lengths cover q: queries of no sequence give 0.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        out[rows], lse[:, rows] = (
            result[0]
            for result in one.attention_fwd(
                q[None, rows], k[None, keys], v[None, keys], alibi_slopes, None, None, rng,
                softmax_scale, left, right, softcap, dropout_p, b,
            )
        )  # fmt: skip
    return out, lse


def attention_varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    rng: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, empty where `grad_mask` is False."""
    dq, dk, dv = (
        torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v), grad_mask, strict=True)
    )
    for b, rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        *parts, _ = one.attention_bwd(
            dout[None, rows], None if dlse is None else dlse[None, :, rows], q[None, rows],
            k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows].contiguous(),
            alibi_slopes, None, None, rng, softmax_scale, left, right, softcap, dropout_p,
            grad_mask, False, deterministic, b,
        )  # fmt: skip
        for gradient, part, place, wanted in zip(
            (dq, dk, dv), parts, (rows, keys, keys), grad_mask, strict=True
        ):
            if wanted:
                gradient[place] = part[0]
    return dq, dk, dv


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(number, queries, keys) of each sequence that has queries or keys."""
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        if q1 > q0 or k1 > k0:
            yield b, slice(q0, q1), slice(k0, k1)
