"""Launchers of the CUDA C++ attention kernels (csrc/attention_fwd_kernel.h has the formulas)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels import philox
from gptkernels.cuda import call, dtype_code


def attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    alibi_slopes: Tensor | None,  # (H,) fp32
    key_lengths: Tensor | None,  # (B,) int32
    attn_mask: Tensor | None,
    rng: Tensor | None,  # (2,) int64
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32. Raises NotImplementedError for an attn_mask."""
    if attn_mask is not None:
        raise NotImplementedError("attn_mask runs with impl='torch' only, got impl='cuda'")
    B, Tq, H, D = q.shape
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    call(
        "attention_fwd",
        q,
        inputs=dict(q=q, k=k, v=v, **_vectors(alibi_slopes, key_lengths, rng)),
        outputs=dict(out=out, lse=lse),
        **_scalars(q, k, v, softmax_scale, left, right, softcap, dropout_p),
    )
    return out, lse


def _vectors(
    alibi_slopes: Tensor | None, key_lengths: Tensor | None, rng: Tensor | None
) -> dict[str, Tensor | None]:
    """What the kernels read without strides."""
    named = dict(alibi_slopes=alibi_slopes, key_lengths=key_lengths, rng=rng)
    return {name: None if x is None else x.contiguous() for name, x in named.items()}


def _scalars(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> dict[str, Any]:
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    return dict(
        dtype=dtype_code(q.dtype),
        batch=B, Tq=Tq, Tk=Tk, H=H, Hk=Hk, D=D,
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        scale=softmax_scale, left=left, right=right, softcap=softcap,
        dropout_threshold=philox.threshold(dropout_p), dropout_scale=philox.scale(dropout_p),
    )  # fmt: skip
