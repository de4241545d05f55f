"""Launchers of the attention kernels and the tiles they use; formulas and shapes are in `attention_fwd` and
`attention_bwd`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gptkernels import philox

from . import on_device
from .attention_bwd import delta_kernel, keys_kernel, queries_kernel
from .attention_fwd import forward_kernel

# (rows BM, keys BN, warps, stages) by the padded width of a head. Chosen so that no kernel spills a register and each
# fits 99 KB of shared memory, the least of sm_80 and later; no GPU has timed them yet.
_FORWARD = {
    2: {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    4: {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
}
_KEYS = {
    2: {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    4: {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}
_QUERIES = {
    2: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
    4: {64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
}
_DELTA_ROWS = 64


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
        raise NotImplementedError("attn_mask runs with impl='torch' only, got impl='triton'")
    B, Tq, H, D = q.shape
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    BM, BN, warps, stages = _tile(_FORWARD, q)
    arguments, switches = _arguments(
        q, k, alibi_slopes, key_lengths, softmax_scale, left, right, softcap, dropout_p
    )
    with on_device(q):
        forward_kernel[(triton.cdiv(Tq, BM) * B * H,)](
            q, k, v, alibi_slopes, key_lengths, rng, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *arguments,
            D, _padded(D), BM, BN, *switches, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
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
    mask_gradient: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv contiguous, and an empty tensor: there is no mask here. The same bits on every run, asked for or not."""
    B, Tq, H, D = q.shape
    Tk, Hk = k.shape[1], k.shape[2]
    dq = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, Tk, Hk, D), dtype=k.dtype, device=k.device)
    dv = torch.empty((B, Tk, Hk, D), dtype=v.dtype, device=v.device)
    dmask = torch.empty(0, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask
    if dout.stride(-1) != 1:  # an expanded cotangent
        dout = dout.contiguous()
    delta = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    arguments, switches = _arguments(
        q, k, alibi_slopes, key_lengths, softmax_scale, left, right, softcap, dropout_p
    )
    inputs = (q, k, v, alibi_slopes, key_lengths, rng, dout, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    BD = _padded(D)
    with on_device(q):
        delta_kernel[(triton.cdiv(Tq, _DELTA_ROWS) * B * H,)](
            out, dout, None if dlse is None else dlse.contiguous(), delta, *dout.stride()[:3], H, Tq,
            D, BD, _DELTA_ROWS, dlse is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        BM, BN, warps, stages = _tile(_KEYS, q)
        keys_kernel[(triton.cdiv(Tk, BN) * B * Hk,)](
            *inputs, dk, dv, *strides, *arguments, D, BD, BM, BN, *switches,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        BM, BN, warps, stages = _tile(_QUERIES, q)
        queries_kernel[(triton.cdiv(Tq, BM) * B * H,)](
            *inputs, dq, *strides, *arguments, D, BD, BM, BN, *switches,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk, dv, dmask


def _arguments(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """What the three kernels share: the scalars after the strides, and the switches after the tile sizes."""
    (Tq, H), (Tk, Hk) = q.shape[1:3], k.shape[1:3]
    # A bound that no pair of these lengths reaches is none: one kernel less, and no comparison.
    has_left, has_right = 0 <= left < Tk - 1, 0 <= right < Tq - 1
    # Folding the scale into exp2 needs the largest product to give the largest score.
    scaled = softcap > 0 or alibi_slopes is not None or softmax_scale <= 0
    scalars = (
        H, H // Hk, Tq, Tk, left if has_left else 0, right if has_right else 0,
        softmax_scale, softcap, philox.threshold(dropout_p), philox.scale(dropout_p),
    )  # fmt: skip
    switches = (
        has_left, has_right, key_lengths is not None,
        scaled, softcap > 0, alibi_slopes is not None, dropout_p > 0,
    )  # fmt: skip
    return scalars, switches


def _padded(D: int) -> int:
    """The width that a tile takes: dots want powers of two from 16 on."""
    return max(16, triton.next_power_of_2(D))


def _tile(
    tiles: dict[int, dict[int, tuple[int, int, int, int]]], q: Tensor
) -> tuple[int, int, int, int]:
    return tiles[q.element_size()][max(64, _padded(q.shape[-1]))]
