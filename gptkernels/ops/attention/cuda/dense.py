"""Launchers of attention's CUDA C++ kernels; the formulas are in csrc/attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.native import call, dtype_code


class Sequences(NamedTuple):
    """Of a batch whose sequences lie end to end; the tensors are those of one entry then."""

    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor
    max_seqlen_q: int  # at least 1, as B and max_seqlen_k
    max_seqlen_k: int


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
    build: int = -1,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32. Raises NotImplementedError for an attn_mask.

    `build` is a way to build the kernel of compute capability 9.0, an index into the module's
    attention_fwd_builds(); RuntimeError where it cannot take the call.
    """
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
        inputs=dict(q=q, k=k, v=v, **_vectors(alibi_slopes, key_lengths, rng, sequences)),
        outputs=dict(out=out, lse=lse),
        **_scalars(q, k, v, softmax_scale, left, right, softcap, dropout_p, sequences),
        build=build,
    )
    return out, lse


def attention_bwd(
    dout: Tensor,  # (B, Tq, H, D)
    dlse: Tensor | None,  # (B, H, Tq) fp32
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    grad_mask: Sequence[bool],
    mask_gradient: bool,
    deterministic: bool,
    build: int = -1,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv contiguous, empty where `grad_mask` is False, and an empty tensor: there is no
    mask here.

    In 16 bits dq is added up in another order on every run (by the generic kernels only where dk or
    dv is wanted too); not if `deterministic`. `build` is a number of the module's
    attention_bwd_builds, -1 for the choice of its rule; RuntimeError with the reason where it
    cannot take the problem.
    """
    dq, dk, dv = (
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v), grad_mask, strict=True)
    )
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), q.new_empty(0)
    if not any(grad_mask):
        return dq, dk, dv, q.new_empty(0)
    if dout.stride(-1) != 1:  # an expanded cotangent
        dout = dout.contiguous()
    call(
        "attention_bwd",
        q,
        inputs=dict(
            q=q, k=k, v=v, dout=dout, out=out, lse=lse,
            dlse=None if dlse is None else dlse.contiguous(),
            **_vectors(alibi_slopes, key_lengths, rng, sequences),
        ),
        outputs=dict(dq=dq, dk=dk, dv=dv),
        workspaces=dict(
            delta=torch.float32, total=torch.float32, dq_sum=torch.float32,
            row_stats=torch.float32, turns=torch.int32,
        ),
        **_scalars(q, k, v, softmax_scale, left, right, softcap, dropout_p, sequences),
        dout_strides=dout.stride()[:3],
        deterministic=deterministic,
        build=build,
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0)


def _vectors(
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    sequences: Sequences | None,
) -> dict[str, Tensor | None]:
    """What the kernels read without strides."""
    cu_seqlens_q, cu_seqlens_k = (None, None) if sequences is None else sequences[:2]
    named = dict(
        alibi_slopes=alibi_slopes, key_lengths=key_lengths, rng=rng,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
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
    sequences: Sequences | None,
) -> dict[str, Any]:
    (B, total_q, H, D), (total_k, Hk) = q.shape, k.shape[1:3]
    Tq, Tk = total_q, total_k
    if sequences is not None:
        B = sequences.cu_seqlens_q.shape[0] - 1
        Tq, Tk = sequences.max_seqlen_q, sequences.max_seqlen_k
    return dict(
        dtype=dtype_code(q.dtype),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        batch=B, Tq=Tq, Tk=Tk, H=H, Hk=Hk, D=D,
        softmax_scale=softmax_scale, left=left, right=right, softcap=softcap,
        dropout_threshold=philox.threshold(dropout_p), dropout_scale=philox.scale(dropout_p),
        total_q=total_q, total_k=total_k,
    )  # fmt: skip
