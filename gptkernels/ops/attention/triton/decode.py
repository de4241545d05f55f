"""Attention of a few new tokens to a cache (Dao et al., "Flash-Decoding", 2023). In the first
kernel each program computes an online softmax over one split of the keys; the second kernel
combines the splits.

    split n:  m_n = max_j s_j,  l_n = sum_j exp2(s_j - m_n),  o_n = sum_j exp2(s_j - m_n) v_j / l_n
    z_n = m_n + log2 l_n,  z = log2 sum_n exp2(z_n)
    out = sum_n exp2(z_n - z) o_n,   lse = z ln 2

A head's sink is one more summand of z, whose o_n is 0: the kernel that writes out and lse adds it.

q (B, Tq, H, D), k and v (B, Tmax, Hk, D) or pages (N, page, Hk, D), any strides with a unit last
one; out (B, Tq, H, D) and lse (B, H, Tq) fp32, contiguous. group = H / Hk query heads share a key
head. These heads and the query tokens make the rows of one product: row i * group + g is head g of
token i. So each key and value moves once for BM rows; moving those bytes takes most of the time.
o_n and z_n are stored in fp32 between the kernels. `gptkernels.ops.attention.splits` says which
keys belong to which split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.core.triton_support import Shipped, on_device
from gptkernels.ops.attention import limits
from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.splits import (
    ALIGNMENT,
    LEAST_KEYS,
    MOST_SPLITS,
    most_splits,
)
from gptkernels.ops.attention.triton.dense import padded_width, room_of
from gptkernels.ops.attention.triton.scores import (
    INFINITY,
    LOG2E,
    load_rows,
    nonfinite_part,
    scores,
    sees,
    with_sink,
    without_nonfinite,
)

# (rows BM, keys BN, warps, stages) by the padded head width, at least 64. The names "sm90", "sm80"
# and "fp32" are those of `room_of`. BN divides `ALIGNMENT`.
# Few rows: the keys are read once, and all stages but one are being loaded.
# Many rows: the products need registers.
# fp32 has only tiles of few rows, since there arithmetic takes most of the time.
# No GPU has timed these tiles yet.
_Tile = tuple[int, int, int, int]
_FEW: dict[str, dict[int, _Tile]] = {
    "sm90": {64: (16, 64, 4, 4), 128: (16, 64, 4, 3), 256: (16, 32, 4, 3)},
    "sm80": {64: (16, 64, 4, 4), 128: (16, 32, 4, 4), 256: (16, 32, 4, 3)},
    "fp32": {64: (16, 32, 4, 3), 128: (16, 32, 4, 2), 256: (16, 16, 8, 2)},
}
_MANY: dict[str, dict[int, _Tile]] = {
    "sm90": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2)},
    "sm80": {64: (64, 32, 8, 3), 128: (64, 32, 8, 3), 256: (32, 32, 8, 2)},
    "fp32": _FEW["fp32"],
}
_COMBINED = 16  # splits that are combined at a time
# Triton must not specialise kernels on these arguments. One kernel then serves every cache size, so
# the bits do not depend on the cache's capacity.
_VARYING = (
    "Tq", "pages", "page", "capacity", "max_splits", "num_splits", "left", "right", "stride_table",
    "slopes_stride",
)  # fmt: skip

_LEAST_KEYS = tl.constexpr(LEAST_KEYS)
_MOST_SPLITS = tl.constexpr(MOST_SPLITS)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit
def _keys_per_split(length, num_splits):
    """The same rule as `gptkernels.ops.attention.splits.keys_per_split`."""
    size = _LEAST_KEYS * tl.maximum(1, tl.cdiv(length, _LEAST_KEYS * _MOST_SPLITS))
    if num_splits > 0:
        size = _ALIGNMENT * tl.maximum(1, tl.cdiv(tl.cdiv(length, num_splits), _ALIGNMENT))
    return size


@triton.jit(do_not_specialize=_VARYING)
def attention_decode_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, capacity, Hk, D), or (pages, page, Hk, D) when PAGED
    v_ptr,  # the same shape
    lengths_ptr,  # (B,) int32
    table_ptr,  # (B, capacity / page) int32, read when PAGED
    slopes_ptr,  # (H,) or (B, H) fp32, read when ALIBI
    sinks_ptr,  # (H,) fp32, read when SINKS
    out_ptr,  # (B, Tq, H, D) contiguous
    lse_ptr,  # (B, H, Tq) fp32 contiguous
    part_ptr,  # (B, max_splits, Tq, H, D) fp32 contiguous: o_n, for entries of several splits
    part_lse_ptr,  # (B, max_splits, Tq, H) fp32 contiguous: z_n, in units of log2
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_table,
    Hk, GROUP, Tq, pages, page, capacity, max_splits, num_splits, left, right, scale, softcap,
    slopes_stride,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGED: tl.constexpr,
    TOKENS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Computes one split of the keys for a block of rows of one key head. TOKENS: Tq > 1, so the
    rows of a block may see different keys."""
    row_blocks = tl.cdiv(Tq * GROUP, BM)
    # Neighbouring programs read the same keys, then those of the next head, which are adjacent in
    # memory.
    pid = tl.program_id(0)
    r0 = pid % row_blocks * BM
    kh = (pid // row_blocks % Hk).to(tl.int64)
    split = pid // row_blocks // Hk % max_splits
    b = (pid // row_blocks // Hk // max_splits).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity)
    size = _keys_per_split(length, num_splits)
    splits = tl.maximum(1, tl.cdiv(length, size))
    if split >= splits:
        return
    shift = length - Tq
    first_token = r0 // GROUP
    last_token = tl.minimum((r0 + BM - 1) // GROUP, Tq - 1)
    start = split * size
    end = tl.minimum(start + size, length)
    if HAS_RIGHT:
        end = tl.minimum(end, last_token + shift + right + 1)
    lo = 0
    if HAS_LEFT:
        lo = tl.maximum(first_token + shift - left, 0)
        start = tl.maximum(start, lo // BN * BN)
    if (start >= end) & (splits > 1):
        return  # none of these rows sees a key of this split, and the second kernel skips the split

    rows = r0 + tl.arange(0, BM)
    tokens = rows // GROUP
    heads = kh * GROUP + rows % GROUP
    alive = tokens < Tq
    dims = tl.arange(0, BD)
    q_offsets = (tokens.to(tl.int64) * stride_qt + heads * stride_qh)[:, None] + dims[None, :]
    q = load_rows(q_ptr + b * stride_qb, q_offsets, alive, D, BD, True)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + b * slopes_stride + heads, mask=alive, other=0.0)[:, None]

    k_base = k_ptr + kh * stride_kh
    v_base = v_ptr + kh * stride_vh
    m = tl.full((BM,), -INFINITY, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    broken = tl.full((), 0, tl.int1)
    # Every row sees all keys from full_lo to full_hi, so blocks there need no mask. With one token
    # all blocks take the masked loop.
    full_lo = end
    full_hi = end
    if TOKENS:
        full_lo = start
        if HAS_LEFT:
            full_lo = tl.maximum(start, tl.cdiv(last_token + shift - left, BN) * BN)
        full_hi = end
        if HAS_RIGHT:
            full_hi = tl.minimum(end, first_token + shift + right + 1)
        full_hi = tl.maximum(full_lo, full_hi // BN * BN)
        full_lo = tl.minimum(full_lo, end)
        full_hi = tl.minimum(full_hi, end)
    for masked in tl.static_range(1, -TOKENS, -1):
        first, stop = (start, end - (full_hi - full_lo)) if masked else (full_lo, full_hi)
        for step in tl.range(first, stop, BN):
            j0 = step
            if masked:
                j0 += tl.where(step >= full_lo, full_hi - full_lo, 0)
            cols = j0 + tl.arange(0, BN)
            wanted = (cols >= lo) & (cols < end)
            entry, place = _where(table_ptr, stride_table, b, cols, wanted, pages, page, PAGED)
            k_offsets = (entry * stride_kb + place * stride_kt)[:, None] + dims[None, :]
            k = load_rows(k_base, k_offsets, wanted, D, BD, masked)
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
            s, factor, _ = scores(
                product, tokens[:, None], cols[None, :], shift, scale, softcap, slope,
                SCALED, SOFTCAP, ALIBI,
            )  # fmt: skip
            if masked:
                seen = wanted[None, :]
                if TOKENS:
                    seen = seen & sees(
                        tokens[:, None],
                        cols[None, :],
                        shift,
                        left,
                        right,
                        length,
                        HAS_LEFT,
                        HAS_RIGHT,
                    )
                s = tl.where(seen, s, -INFINITY)
            m_new = tl.maximum(m, tl.max(s, 1) * factor)
            # For a row that has seen no key yet, subtract 0 instead of -inf: its weights become
            # exp2(-inf) = 0.
            m_used = tl.where(m_new == -INFINITY, 0.0, m_new)
            p = tl.exp2(tl.fma(s, factor, -m_used[:, None]))
            rescale = tl.exp2(m - m_used)
            l = l * rescale + tl.sum(p, 1)
            acc *= rescale[:, None]
            m = m_new
            v_offsets = (entry * stride_vb + place * stride_vt)[:, None] + dims[None, :]
            v = load_rows(v_base, v_offsets, wanted, D, BD, masked)
            if masked and TOKENS:
                v, broken = without_nonfinite(v, broken)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if broken:
        for j in range(tl.maximum(start, lo), end):
            entry, place = _where(table_ptr, stride_table, b, j, True, pages, page, PAGED)
            lost = nonfinite_part(v_base + entry * stride_vb + place * stride_vt, D, BD)
            seen = sees(tokens, j, shift, left, right, length, HAS_LEFT, HAS_RIGHT)
            acc += tl.where(seen[:, None], lost[None, :], 0.0)

    none = l == 0.0
    if SINKS:
        alone = alive & (splits == 1)
        sink = tl.load(sinks_ptr + heads, mask=alone, other=-INFINITY)
        m, l, factor = with_sink(m, l, sink)
        acc *= factor[:, None]
    l_used = tl.where(l == 0.0, 1.0, l)
    acc = acc / l_used[:, None]
    lse = tl.where(none, -INFINITY, m + tl.log2(l_used))
    stored = alive[:, None] & (dims < D)[None, :]
    if splits == 1:
        row = (b * Tq + tokens) * (Hk * GROUP) + heads
        tl.store(
            out_ptr + row[:, None] * D + dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=stored,
        )
        lse = lse / LOG2E
        if SINKS:
            lse = tl.where(none, sink, lse)
        tl.store(lse_ptr + (b * Hk * GROUP + heads) * Tq + tokens, lse, mask=alive)
    else:
        row = ((b * max_splits + split) * Tq + tokens) * (Hk * GROUP) + heads
        tl.store(part_ptr + row[:, None] * D + dims[None, :], acc, mask=stored)
        tl.store(part_lse_ptr + row, lse, mask=alive)


@triton.jit
def _where(table_ptr, stride_table, b, cols, wanted, pages, page, PAGED: tl.constexpr):
    """Returns (entry, place), int64: where the caches hold the keys `cols` of batch entry b."""
    if PAGED:
        number = tl.load(table_ptr + b * stride_table + cols // page, mask=wanted, other=0)
        entry = tl.minimum(tl.maximum(number, 0), pages - 1).to(tl.int64)
        return entry, tl.cast(cols % page, tl.int64)
    else:
        return b, tl.cast(cols, tl.int64)


@triton.jit(do_not_specialize=_VARYING)
def attention_decode_combine_kernel(
    lengths_ptr,  # (B,) int32
    part_ptr,  # (B, max_splits, Tq, H, D) fp32
    part_lse_ptr,  # (B, max_splits, Tq, H) fp32, in units of log2
    sinks_ptr,  # (H,) fp32, read when SINKS
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32
    H, Tq, capacity, max_splits, num_splits, left, right,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Computes one row of out and lse from the splits that hold keys of the row, in their order."""
    row = tl.program_id(0).to(tl.int64) % (Tq * H)
    b = tl.program_id(0).to(tl.int64) // (Tq * H)
    token = row // H
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity)
    size = _keys_per_split(length, num_splits)
    if length <= size:
        return  # there is one split, and the first kernel has written its out and lse
    position = (token + length - Tq).to(tl.int32)
    hi = length
    if HAS_RIGHT:
        hi = tl.minimum(hi, position + right + 1)
    first = 0
    if HAS_LEFT:
        first = tl.maximum(position - left, 0) // size
    last = tl.cdiv(tl.maximum(hi, 0), size)
    base = b * max_splits * Tq * H + row
    m = -INFINITY
    for s0 in range(first, last, BS):
        parts = s0 + tl.arange(0, BS)
        z = tl.load(
            part_lse_ptr + base + parts.to(tl.int64) * Tq * H, mask=parts < last, other=-INFINITY
        )
        m = tl.maximum(m, tl.max(z, 0))
    m_used = tl.where(m == -INFINITY, 0.0, m)
    dims = tl.arange(0, BD)
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    for s0 in range(first, last, BS):
        parts = s0 + tl.arange(0, BS)
        offsets = base + parts.to(tl.int64) * Tq * H
        z = tl.load(part_lse_ptr + offsets, mask=parts < last, other=-INFINITY)
        weights = tl.exp2(z - m_used)
        o = load_rows(part_ptr, offsets[:, None] * D + dims[None, :], parts < last, D, BD, True)
        total += tl.sum(weights, 0)
        acc += tl.sum(weights[:, None] * o, 0)
    none = total == 0.0
    lse_of_none = -INFINITY
    if SINKS:
        lse_of_none = tl.load(sinks_ptr + row % H)
        m, total, factor = with_sink(m, total, lse_of_none)
        acc *= factor
    total_used = tl.where(total == 0.0, 1.0, total)
    out = acc / total_used
    place = b * Tq * H + row
    tl.store(out_ptr + place * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    lse = tl.where(none, lse_of_none, (m + tl.log2(total_used)) / LOG2E)
    tl.store(lse_ptr + (b * H + row % H) * Tq + token, lse)


def attention_decode_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k_cache: Tensor,  # (B, Tmax, Hk, D) or (N, page, Hk, D)
    v_cache: Tensor,
    block_table: Tensor | None,  # (B, pages) int32
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, D) and lse (B, H, Tq) in fp32. num_splits is 0 where the user gave
    none. Raises NotImplementedError for what `limits` names."""
    limits.refuse("triton", "attention_decode", q, v_cache, options)
    B, Tq, H, D = q.shape
    entries, page, Hk = k_cache.shape[:3]
    capacity = page if block_table is None else page * block_table.shape[1]
    if q.numel() == 0 or k_cache.numel() == 0 or capacity == 0:
        return without_keys(q, v_cache, options)
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    splits = most_splits(capacity, num_splits)
    has_left, sinks = options.left >= 0, options.sinks is not None
    has_right = 0 <= options.right < Tq - 1  # a bound that hides nothing is dropped
    # So that position - left does not overflow int32.
    bounds = (min(options.left, capacity), options.right if has_right else 0)
    shape = (B, splits, Tq, H) if splits > 1 else (0,)
    parts = torch.empty((*shape, D), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    assert options.key_lengths is not None
    cache_lengths = options.key_lengths.contiguous()
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    BD, rows = padded_width(D), Tq * (H // Hk)
    tiles = (_FEW if rows <= 16 else _MANY)[room_of(q, False)]
    BM, BN, warps, stages = tiles[max(64, BD)]
    grid = triton.cdiv(rows, BM) * Hk * splits * B
    with on_device(q):
        attention_decode_kernel[(grid,)](
            q, k_cache, v_cache, cache_lengths, block_table, options.alibi_slopes, options.sinks,
            out, lse, parts, part_lse, *q.stride()[:3], *k_cache.stride()[:3],
            *v_cache.stride()[:3], 0 if block_table is None else block_table.stride(0),
            Hk, H // Hk, Tq, entries, page, capacity, splits, num_splits, *bounds,
            options.softmax_scale, options.softcap, options.alibi_stride,
            D, BD, BM, BN, block_table is not None, Tq > 1, has_left, has_right,
            options.costly or options.softmax_scale <= 0, options.softcap > 0,
            options.alibi_slopes is not None, sinks,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            attention_decode_combine_kernel[(B * Tq * H,)](
                cache_lengths, parts, part_lse, options.sinks, out, lse, H, Tq, capacity, splits,
                num_splits, *bounds, D, BD, _COMBINED, has_left, has_right, sinks,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def shipped() -> Iterator[Shipped]:
    """Yields the configurations for the ahead-of-time compile: tiles of few rows without options,
    and tiles of many rows with every option.

    Width 128 is compiled for all architectures. The other widths are compiled for sm_86, which has
    the least shared memory, and sm_90, which has the most users. fp16 has the same tiles as bf16,
    and instructions that differ only in the type, so it is left out.
    """
    everything = (80, 86, 90, 100)
    for D in (64, 128, 256):
        architectures = everything if D == 128 else (86, 90)
        for tiles, options in ((_FEW, "few rows"), (_MANY, "all")):
            for where in ("sm90", "sm80"):
                chosen = tuple(a for a in architectures if (a in (90, 100)) == (where == "sm90"))
                yield _shipped(tiles[where][D], D, "bf16", options, where, chosen)
        yield _shipped(_FEW["fp32"][D], D, "fp32", "all", "", architectures)
    constexprs = dict(D=256, BD=256, BS=_COMBINED, HAS_LEFT=True, HAS_RIGHT=True, SINKS=True)
    yield _configuration(
        "attention_decode_combine D256 bf16", attention_decode_combine_kernel, "bf16", constexprs,
        4, 3, everything,
    )  # fmt: skip


def _shipped(
    tile: _Tile, D: int, dtype: str, options: str, where: str, architectures: tuple[int, ...]
) -> Shipped:
    BM, BN, warps, stages = tile
    switches = (
        "PAGED", "TOKENS", "HAS_LEFT", "HAS_RIGHT", "SCALED", "SOFTCAP", "ALIBI", "SINKS",
    )  # fmt: skip
    constexprs = dict(D=D, BD=D, BM=BM, BN=BN) | dict.fromkeys(switches, options == "all")
    name = f"attention_decode D{D} {dtype} {options}{' sm80' if where == 'sm80' else ''}"
    kernel = attention_decode_kernel
    return _configuration(name, kernel, dtype, constexprs, warps, stages, architectures)


def _configuration(
    name: str,
    kernel: Any,
    dtype: str,
    constexprs: dict[str, Any],
    warps: int,
    stages: int,
    architectures: tuple[int, ...],
) -> Shipped:
    types = dict(lengths_ptr="*i32", table_ptr="*i32", scale="fp32", softcap="fp32")
    floats = ("slopes_ptr", "sinks_ptr", "lse_ptr", "part_ptr", "part_lse_ptr")
    types |= dict.fromkeys(floats, "*fp32")
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = types.get(argument, f"*{dtype}")
        else:
            signature[argument] = types.get(argument, "i32")
    aligned = tuple(n for n in signature if n.endswith("_ptr") or n.startswith("stride_"))
    aligned = tuple(name for name in aligned if name not in _VARYING)
    return Shipped(name, kernel, signature, constexprs, warps, stages, aligned, architectures)
