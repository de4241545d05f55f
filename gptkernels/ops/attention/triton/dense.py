"""Launchers of the attention kernels and the tiles they use; formulas are in `fwd` and `bwd`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.triton_support import Shipped, on_device
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.triton.bwd import (
    attention_bwd_delta_kernel,
    attention_bwd_keys_kernel,
    attention_bwd_queries_kernel,
)
from gptkernels.ops.attention.triton.fwd import attention_fwd_kernel

# (rows BM, keys BN, warps, stages) by the padded width of a head, the least 64. "sm90" is for
# 16-bit inputs on sm_90 and sm_100, whose tensor cores read operands from shared memory and want
# 64 rows of the left one; "sm90 options" for these with softcap, ALiBi or dropout, which cost
# registers; "sm80" fits the 99 KB of shared memory of sm_86, sm_89 and sm_120. Each is the
# largest found that spills little or nothing (gates/triton.json); the keys kernel at 256 gives up
# wgmma for that. No GPU has timed them yet.
_Tile = tuple[int, int, int, int]
_FORWARD: dict[str, dict[int, _Tile]] = {
    "sm90": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "sm90 options": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 8, 2)},
    "sm80": {64: (128, 32, 8, 3), 128: (64, 32, 8, 3), 256: (32, 32, 8, 2)},
    "fp32": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
}
_QUERIES: dict[str, dict[int, _Tile]] = {
    "sm90": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "sm90 options": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "sm80": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 4, 2)},
    "fp32": {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}
_KEYS: dict[str, dict[int, _Tile]] = {
    "sm90": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "sm90 options": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "sm80": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "fp32": {64: (16, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}
_DELTA_ROWS = 64
_ARCHITECTURES = (80, 86, 90, 100)


def attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32. Raises NotImplementedError for an attn_mask."""
    if options.attn_mask is not None:
        raise NotImplementedError("attn_mask runs with impl='torch' only, got impl='triton'")
    B, Tq, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    arguments, switches = _arguments(q, k, options)
    BM, BN, warps, stages = _FORWARD[room_of(q, options.costly)][max(64, padded_width(D))]
    with on_device(q):
        attention_fwd_kernel[_grid(q, H, BM, options.cu_seqlens_q)](
            q, k, v, *_vectors(options), out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *arguments,
            D, padded_width(D), BM, BN, *switches, options.cu_seqlens_q is not None,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
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
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv contiguous, empty where `grad_mask` is False, and an empty tensor: there is no
    mask here.

    No kernel uses atomics: the bits are the same on every run, asked for or not.
    """
    B, Tq, H, D = q.shape
    exact = q.dtype == torch.float32
    # dk and dv come from one kernel; in fp32 it needs what the other one finds out about rows.
    keys_wanted = grad_mask[1] or grad_mask[2]
    queries_wanted = grad_mask[0] or (exact and keys_wanted)
    dq, dk, dv = gradients = tuple(
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in ((q, queries_wanted), (k, keys_wanted), (v, keys_wanted))
    )

    def asked_for() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = zip(gradients, grad_mask, strict=False)
        a, b, c = (gradient if wanted else q.new_empty(0) for gradient, wanted in found)
        return a, b, c, q.new_empty(0)

    if q.numel() == 0 or k.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return asked_for()
    if dout.stride(-1) != 1:  # an expanded cotangent
        dout = dout.contiguous()
    delta = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    total = torch.empty_like(delta) if exact else None
    dlse = None if dlse is None else dlse.contiguous()
    arguments, switches = _arguments(q, k, options)
    # In 16 bits the delta kernel takes dlse in.
    switches = (*switches, exact, exact and dlse is not None, options.cu_seqlens_q is not None)
    inputs = (q, k, v, *_vectors(options), dout, lse, delta, total, dlse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    BD = padded_width(D)
    room = room_of(q, options.costly)
    with on_device(q):
        if not exact:
            # Row by row: where sequences end is nothing to it.
            attention_bwd_delta_kernel[(triton.cdiv(Tq, _DELTA_ROWS) * B * H,)](
                out, dout, dlse, delta, *dout.stride()[:3], H, Tq, D, BD, _DELTA_ROWS,
                dlse is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        if queries_wanted:
            BM, BN, warps, stages = _QUERIES[room][max(64, BD)]
            attention_bwd_queries_kernel[_grid(q, H, BM, options.cu_seqlens_q)](
                *inputs, dq, *strides, *arguments, D, BD, BM, BN, *switches,
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
        if keys_wanted:
            BM, BN, warps, stages = _KEYS[room][max(64, BD)]
            attention_bwd_keys_kernel[_grid(k, k.shape[2], BN, options.cu_seqlens_q)](
                *inputs, dk, dv, *strides, *arguments, D, BD, BM, BN, *switches,
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return asked_for()


def _grid(x: Tensor, heads: int, block: int, cu_seqlens: Tensor | None) -> tuple[int]:
    """Programs for each block of x's tokens and each head, as `place` counts them."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return (triton.cdiv(T, block) * B * heads,)
    return ((T // block + cu_seqlens.shape[0] + 1) * heads,)


def _vectors(options: AttentionOptions) -> tuple[Tensor | None, ...]:
    """What the kernels read without strides, in the order of their parameters."""
    tensors = (
        options.alibi_slopes,
        options.key_lengths,
        options.rng,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
    )
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _arguments(
    q: Tensor, k: Tensor, options: AttentionOptions
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """What the kernels share: the scalars after the strides, the switches after the tile sizes."""
    (B, Tq, H), (Tk, Hk) = q.shape[:3], k.shape[1:3]
    if options.cu_seqlens_q is not None:
        B = options.cu_seqlens_q.shape[0] - 1
    left, right = options.left, options.right
    # A bound that no pair of these lengths reaches is none: one kernel less, and no comparison.
    has_left, has_right = 0 <= left < Tk - 1, 0 <= right < Tq - 1
    softcap, alibi, dropout = (
        options.softcap > 0,
        options.alibi_slopes is not None,
        options.dropout_p,
    )
    # Folding the scale into exp2 needs the largest product to give the largest score.
    scaled = softcap or alibi or options.softmax_scale <= 0
    scalars = (
        B, H, H // Hk, Tq, Tk, left if has_left else 0, right if has_right else 0,
        options.softmax_scale, options.softcap, philox.threshold(dropout), philox.scale(dropout),
    )  # fmt: skip
    switches = (
        has_left, has_right, options.key_lengths is not None,
        scaled, softcap, alibi, dropout > 0,
    )  # fmt: skip
    return scalars, switches


def padded_width(D: int) -> int:
    """The width that a tile takes: dots want powers of two from 16 on."""
    return max(16, triton.next_power_of_2(D))


def room_of(q: Tensor, costly: bool) -> str:
    """Which tiles; costly: with softcap, ALiBi or dropout."""
    if q.dtype == torch.float32:
        return "fp32"
    if not _reads_operands_from_shared_memory(q.device):
        return "sm80"
    return "sm90 options" if costly else "sm90"


@functools.cache
def _reads_operands_from_shared_memory(device: torch.device) -> bool:
    """Tensor cores of sm_90 and sm_100; taken for granted where the interpreter runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def shipped() -> Iterator[Shipped]:
    """Every tile at its padded width: plain causal, and with every option on, the most registers.

    fp16 takes the tiles and the instructions of bf16 in another type: one width stands for all, and
    so does one chip for sequences laid end to end.
    """
    for D in (64, 128, 256):
        for kernel, tiles in (
            (attention_fwd_kernel, _FORWARD),
            (attention_bwd_queries_kernel, _QUERIES),
            (attention_bwd_keys_kernel, _KEYS),
        ):
            yield _shipped(kernel, tiles["sm90"][D], D, "bf16", "varlen causal", (90,))
            yield _shipped(kernel, tiles["sm90"][D], D, "bf16", "causal", (90, 100))
            yield _shipped(kernel, tiles["sm80"][D], D, "bf16", "causal sm80", (80, 86))
            yield _shipped(kernel, tiles["sm90 options"][D], D, "bf16", "all", (90, 100))
            yield _shipped(kernel, tiles["sm80"][D], D, "bf16", "all sm80", (80, 86))
            yield _shipped(kernel, tiles["fp32"][D], D, "fp32", "all", _ARCHITECTURES)
            if D == 128:
                yield _shipped(kernel, tiles["sm90"][D], D, "fp16", "causal", (90, 100))
        delta = (_DELTA_ROWS, 0, 4, 3)
        yield _shipped(attention_bwd_delta_kernel, delta, D, "bf16", "all", _ARCHITECTURES)


def _shipped(
    kernel: Any, tile: _Tile, D: int, dtype: str, options: str, architectures: tuple[int, ...]
) -> Shipped:
    BM, BN, warps, stages = tile
    types = dict.fromkeys(("slopes_ptr", "lse_ptr", "delta_ptr", "total_ptr"), "*fp32")
    types |= {"dlse_ptr": "*fp32", "rng_ptr": "*i64"}
    types |= dict.fromkeys(("lengths_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")
    types |= dict.fromkeys(("scale", "softcap", "dropout_scale"), "fp32")
    everything = options.startswith("all")
    constexprs = {
        "D": D, "BD": D, "BM": BM, "BN": BN, "HAS_LEFT": everything, "HAS_RIGHT": True,
        "LENGTHS": everything, "SCALED": everything, "SOFTCAP": everything, "ALIBI": everything,
        "DROPOUT": everything, "EXACT": dtype == "fp32",
        "HAS_DLSE": everything and (dtype == "fp32" or kernel is attention_bwd_delta_kernel),
        "VARLEN": options.startswith("varlen"),
    }  # fmt: skip
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, f"*{dtype}")
        else:
            signature[name] = types.get(name, "i32")
    stem = kernel.__name__.removesuffix("_kernel")
    return Shipped(
        f"{stem} D{D} {dtype} {options}",
        kernel,
        signature,
        {name: value for name, value in constexprs.items() if name in signature},
        warps,
        stages,
        tuple(name for name in signature if name.endswith("_ptr") or name.startswith("stride")),
        architectures,
    )
