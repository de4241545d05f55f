"""Launchers of the CUDA C++ attention kernels for sequences laid end to end: those of `attention`
on a batch of one entry, which finds the sequences in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.ops.attention.cuda import dense as one
from gptkernels.ops.attention.cuda.dense import Sequences


def attention_varlen_fwd(
    q: Tensor,  # (total_q, H, D)
    k: Tensor,  # (total_k, Hk, D)
    v: Tensor,  # (total_k, Hk, D)
    cu_seqlens_q: Tensor,  # (B + 1,) int32
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,  # (H,) fp32
    rng: Tensor | None,  # (2,) int64
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (total_q, H, D) and lse (H, total_q) fp32.

    Nothing is read on the host. Lengths are clamped to what the tensors hold, so that no access is
    out of bounds whatever cu_seqlens hold.
    """
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if sequences is None:
        lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    out, lse = one.attention_fwd(
        q[None], k[None], v[None], alibi_slopes, None, None, rng, softmax_scale, left, right,
        softcap, dropout_p, sequences=sequences,
    )  # fmt: skip
    return out[0], lse[0]


def attention_varlen_bwd(
    dout: Tensor,  # (total_q, H, D)
    dlse: Tensor | None,  # (H, total_q) fp32
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
    """dq, dk and dv contiguous, empty where `grad_mask` is False; in 16 bits dq is added up as
    `attention_bwd` says."""
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if sequences is None:
        dq, dk, dv = (
            torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
            for x, wanted in zip((q, k, v), grad_mask, strict=True)
        )
        return dq, dk, dv
    *gradients, _ = one.attention_bwd(
        dout[None], None if dlse is None else dlse[None], q[None], k[None], v[None], out[None],
        lse[None], alibi_slopes, None, None, rng, softmax_scale, left, right, softcap, dropout_p,
        grad_mask, False, deterministic, sequences=sequences,
    )  # fmt: skip
    dq, dk, dv = (
        gradient[0] if wanted else gradient
        for gradient, wanted in zip(gradients, grad_mask, strict=True)
    )
    return dq, dk, dv


def _sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Sequences | None:
    """None where no query sees a key."""
    longest_q, longest_k = min(max_seqlen_q, q.shape[0]), min(max_seqlen_k, k.shape[0])
    if cu_seqlens_q.shape[0] < 2 or longest_q <= 0 or longest_k <= 0:
        return None
    return Sequences(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
