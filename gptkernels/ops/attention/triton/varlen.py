"""Launchers of the attention kernels for sequences laid end to end.

The kernels are those of `attention`, switched to VARLEN, see `attention_place`: the same tiles, the
same bits as each sequence alone. Neither the longest lengths nor the lengths themselves are read on
the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.ops.attention.triton import dense as one


def attention_varlen_fwd(
    q: Tensor,  # (total_q, H, D)
    k: Tensor,  # (total_k, Hk, D)
    v: Tensor,  # (total_k, Hk, D)
    cu_seqlens_q: Tensor,  # (B + 1,) int32
    cu_seqlens_k: Tensor,  # (B + 1,) int32
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
    """out (total_q, H, D) and lse (H, total_q) fp32; queries of no sequence give 0 and -inf."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    one.forward(
        q[None], k[None], v[None], alibi_slopes, None, rng, (cu_seqlens_q, cu_seqlens_k),
        softmax_scale, left, right, softcap, dropout_p, out, lse,
    )  # fmt: skip
    return out, lse


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
    """dq, dk and dv contiguous, empty where `grad_mask` is False; deterministic in any case."""
    return one.backward(
        dout[None], dlse, q[None], k[None], v[None], out, lse, alibi_slopes, None, rng,
        (cu_seqlens_q, cu_seqlens_k), softmax_scale, left, right, softcap, dropout_p, grad_mask,
        q.shape, k.shape,
    )  # fmt: skip
