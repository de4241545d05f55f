"""Launchers of attention's Triton kernels, and the tiles that they choose from. The formulas are in
`fwd` and `bwd` of this package."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.triton_support import Shipped, Tile, on_device
from gptkernels.ops.attention import limits, widths
from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.triton.bwd import (
    attention_bwd_delta_kernel,
    attention_bwd_keys_kernel,
    attention_bwd_queries_kernel,
)
from gptkernels.ops.attention.triton.fwd import attention_fwd_kernel

# (rows BM, keys BN, warps, stages) by the padded head width, at least 64.
# "sm90": 16-bit inputs on sm_90 and sm_100. Their tensor cores read operands from shared memory and
# want 64 rows of the left operand.
# "sm90 options": the same with softcap, ALiBi or dropout, which need more registers.
# "sm80": 16-bit inputs on all other GPUs; it fits the 99 KB of shared memory of sm_86, sm_89 and
# sm_120.
# Each tile is the largest found that spills few registers or none (gates/triton.json). For that the
# keys kernel of width 256 does without wgmma. No GPU has timed these tiles yet.
_Tile = tuple[int, int, int, int]
_Table = dict[str, dict[int, _Tile]]
_FORWARD: _Table = {
    "sm90": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "sm90 options": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 8, 2)},
    "sm80": {64: (128, 32, 8, 3), 128: (64, 32, 8, 3), 256: (32, 32, 8, 2)},
    "fp32": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
}
_QUERIES: _Table = {
    "sm90": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "sm90 options": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "sm80": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 4, 2)},
    "fp32": {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}
_KEYS: _Table = {
    "sm90": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "sm90 options": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "sm80": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "fp32": {64: (16, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}
_DELTA_ROWS = 64
_ARCHITECTURES = (80, 86, 90, 100)


@widths.forward
def attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    options: AttentionOptions,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, D) and lse (B, H, Tq) in fp32. Raises NotImplementedError for
    what `limits` names. A `tile` runs in place of the chosen one."""
    limits.refuse("triton", "attention", q, v, options)
    if q.numel() == 0 or k.numel() == 0:
        return without_keys(q, v, options)
    B, Tq, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    arguments, switches = _arguments(q, k, options)
    BM, BN, warps, stages = tile or _tile(_FORWARD, q, options)
    with on_device(q):
        attention_fwd_kernel[_grid(q, H, BM, options.cu_seqlens_q)](
            q, k, v, *_vectors(options), options.sinks, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *arguments,
            D, padded_width(D), BM, BN, *switches, options.cu_seqlens_q is not None,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


@widths.backward
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
    *,
    queries_tile: Tile | None = None,
    keys_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, the mask's gradient, which is always empty, and by_query, contiguous,
    each empty where `grad_mask` is False. A tile of a kernel runs in place of the chosen one.

    No kernel uses atomics, so gradients have the same bits on every run even without
    `deterministic`.
    """
    B, Tq, H, D = q.shape
    exact = q.dtype == torch.float32
    # One kernel computes dk and dv, and one dq and by_query. In fp32 the former needs the sums over
    # rows that the latter computes.
    _, dk_wanted, dv_wanted, _, by_query_wanted = grad_mask
    keys_wanted = dk_wanted or dv_wanted
    queries_wanted = grad_mask[0] or by_query_wanted or (exact and keys_wanted)
    dq, dk, dv, _, by_query = gradients = tuple(
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in (
            (q, queries_wanted),
            (k, keys_wanted),
            (v, keys_wanted),
            (q, False),
            (lse, by_query_wanted),
        )
    )

    def asked_for() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b, c, d, e = (
            gradient if wanted else gradient.new_empty(0)
            for gradient, wanted in zip(gradients, grad_mask, strict=True)
        )
        return a, b, c, d, e

    if q.numel() == 0 or k.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return asked_for()
    if dout.stride(-1) != 1:  # such as an expanded tensor
        dout = dout.contiguous()
    delta = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    total = torch.empty_like(delta) if exact else None
    dlse = None if dlse is None else dlse.contiguous()
    arguments, switches = _arguments(q, k, options)
    # In 16 bits the delta kernel subtracts dlse, so the other kernels need it in fp32 only.
    switches = (*switches, exact, exact and dlse is not None, options.cu_seqlens_q is not None)
    inputs = (q, k, v, *_vectors(options), dout, lse, delta, total, dlse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    BD = padded_width(D)
    with on_device(q):
        if not exact:
            # This kernel treats each row by itself, so packed sequences need nothing special.
            attention_bwd_delta_kernel[(triton.cdiv(Tq, _DELTA_ROWS) * B * H,)](
                out, dout, dlse, delta, *dout.stride()[:3], H, Tq, D, BD, _DELTA_ROWS,
                dlse is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        if queries_wanted:
            BM, BN, warps, stages = queries_tile or _tile(_QUERIES, q, options)
            attention_bwd_queries_kernel[_grid(q, H, BM, options.cu_seqlens_q)](
                *inputs, options.sinks, dq, by_query if by_query_wanted else None, *strides,
                *arguments, D, BD, BM, BN, *switches, by_query_wanted,
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
        if keys_wanted:
            BM, BN, warps, stages = keys_tile or _tile(_KEYS, q, options)
            attention_bwd_keys_kernel[_grid(k, k.shape[2], BN, options.cu_seqlens_q)](
                *inputs, dk, dv, *strides, *arguments, D, BD, BM, BN, *switches,
                num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return asked_for()


def forward_tiles(q: Tensor, options: AttentionOptions) -> dict[str, list[Tile]]:
    """Returns the tiles for q, by the launcher's keyword: first the chosen one, then the others
    that the tables have for q's width, in 16 bits or in fp32."""
    return {"tile": _tiles(_FORWARD, q, options)}


def backward_tiles(q: Tensor, options: AttentionOptions) -> dict[str, list[Tile]]:
    """As `forward_tiles`, for the two kernels of the backward pass."""
    tables = {"queries_tile": _QUERIES, "keys_tile": _KEYS}
    return {keyword: _tiles(table, q, options) for keyword, table in tables.items()}


def _tile(table: _Table, q: Tensor, options: AttentionOptions) -> _Tile:
    return table[room_of(q, options.costly)][max(64, padded_width(q.shape[-1]))]


def _tiles(table: _Table, q: Tensor, options: AttentionOptions) -> list[Tile]:
    width, exact = max(64, padded_width(q.shape[-1])), q.dtype == torch.float32
    others = [tiles[width] for room, tiles in table.items() if (room == "fp32") == exact]
    return list(dict.fromkeys([_tile(table, q, options), *others]))


def _grid(x: Tensor, heads: int, block: int, cu_seqlens: Tensor | None) -> tuple[int]:
    """Returns the number of programs for all blocks of x's tokens and all heads, as `place` counts
    blocks."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return (triton.cdiv(T, block) * B * heads,)
    return ((T // block + cu_seqlens.shape[0] + 1) * heads,)


def _vectors(options: AttentionOptions) -> tuple[Tensor | None, ...]:
    """Returns the options that are tensors, contiguous, in the order of the kernels' parameters."""
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
    """Returns the arguments that the kernels share: the scalars, which come after the strides, and
    the switches, which come after the tile sizes."""
    (B, Tq, H), (Tk, Hk) = q.shape[:3], k.shape[1:3]
    if options.cu_seqlens_q is not None:
        B = options.cu_seqlens_q.shape[0] - 1
    left, right = options.left, options.right
    # Drop a bound that hides nothing at these lengths: fewer kernels to compile, fewer comparisons.
    has_left, has_right = 0 <= left < Tk - 1, 0 <= right < Tq - 1
    softcap, alibi, dropout = (
        options.softcap > 0,
        options.alibi_slopes is not None,
        options.dropout_p,
    )
    # The scale can be folded into exp2 only where the largest product has the largest score.
    scaled = softcap or alibi or options.softmax_scale <= 0
    scalars = (
        B, H, H // Hk, Tq, Tk, left if has_left else 0, right if has_right else 0,
        options.softmax_scale, options.softcap, philox.threshold(dropout), philox.scale(dropout),
        options.alibi_stride,
    )  # fmt: skip
    switches = (
        has_left, has_right, options.key_lengths is not None,
        scaled, softcap, alibi, dropout > 0, options.sinks is not None,
    )  # fmt: skip
    return scalars, switches


def padded_width(D: int) -> int:
    """Returns the width of a tile for head width D: tl.dot requires a power of two, at least 16."""
    return max(16, triton.next_power_of_2(D))


def room_of(q: Tensor, costly: bool) -> str:
    """Returns the key of the table of tiles for q; costly means softcap, ALiBi or dropout."""
    if q.dtype == torch.float32:
        return "fp32"
    if not _reads_operands_from_shared_memory(q.device):
        return "sm80"
    return "sm90 options" if costly else "sm90"


@functools.cache
def _reads_operands_from_shared_memory(device: torch.device) -> bool:
    """Whether the device's tensor cores read operands from shared memory, as those of sm_90 and
    sm_100 do. True for CPU tensors, which the interpreter runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def shipped() -> Iterator[Shipped]:
    """Yields the configurations for the ahead-of-time compile: every tile at its padded width, once
    plain causal and once with every option on, which takes the most registers. The gradient of
    learned slopes is by itself: few calls ask for it, and none with all other options.

    fp16 has the same tiles as bf16, and instructions that differ only in the type, so one width
    stands for all. For packed sequences one architecture stands for all.
    """
    for D in (64, 128, 256):
        for kernel, tiles in (
            (attention_fwd_kernel, _FORWARD),
            (attention_bwd_queries_kernel, _QUERIES),
            (attention_bwd_keys_kernel, _KEYS),
        ):
            if kernel is attention_bwd_queries_kernel:
                yield _shipped(kernel, tiles["sm90 options"][D], D, "bf16", "learned", (90, 100))
                yield _shipped(kernel, tiles["sm80"][D], D, "bf16", "learned sm80", (80, 86))
                yield _shipped(kernel, tiles["fp32"][D], D, "fp32", "learned", _ARCHITECTURES)
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
    floats = ("slopes", "sinks", "lse", "dlse", "delta", "total", "by_query")
    types = {f"{name}_ptr": "*fp32" for name in floats} | {"rng_ptr": "*i64"}
    types |= dict.fromkeys(("lengths_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")
    types |= dict.fromkeys(("scale", "softcap", "dropout_scale"), "fp32")
    everything, learned = options.startswith("all"), options.startswith("learned")
    constexprs = {
        "D": D, "BD": D, "BM": BM, "BN": BN, "HAS_LEFT": everything, "HAS_RIGHT": True,
        "LENGTHS": everything, "SCALED": everything or learned, "SOFTCAP": everything,
        "ALIBI": everything or learned, "DROPOUT": everything, "SINKS": everything or learned,
        "EXACT": dtype == "fp32", "BY_QUERY": learned,
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
