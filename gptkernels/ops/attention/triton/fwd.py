"""Attention forward: online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao,
"FlashAttention-2", 2023).

    m' = max(m, max_j s_j)                      p = exp2(s - m')
    l = l * exp2(m - m') + sum_j p              o = o * exp2(m - m') + p v
    out = o / l                                 lse = (m + log2 l) * ln 2

q (B, Tq, H, D), k and v (B, Tk, Hk, D), any strides with a unit last one; out (B, Tq, H, D) and lse
(B, H, Tq) fp32, contiguous. Bytes: the kernel moves q and out once, and k and v once for each block
of BM rows; scores never leave the chip. Saved for the backward pass: q, k, v and out in their
dtype, and lse. Dropout drops p only in the product with v; the normaliser l sums all p. A head's
sink joins m and l once, after the last key.
"""

import triton
import triton.language as tl

from gptkernels.core.triton_philox import attention_keep_tile
from gptkernels.ops.attention.triton.place import place
from gptkernels.ops.attention.triton.scores import (
    INFINITY,
    LOG2E,
    VARYING,
    key_ranges,
    load_rows,
    load_slope,
    nonfinite_part,
    scores,
    sees,
    with_sink,
    without_nonfinite,
)


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hk, D)
    v_ptr,  # (B, Tk, Hk, D)
    slopes_ptr,  # (H,) or (B, H) fp32, read when ALIBI
    lengths_ptr,  # (B,) int32, read when LENGTHS
    rng_ptr,  # (2,) int64, read when DROPOUT
    cu_q_ptr,  # (B + 1,) int32, read when VARLEN
    cu_k_ptr,  # (B + 1,) int32, read when VARLEN
    sinks_ptr,  # (H,) fp32, read when SINKS
    out_ptr,  # (B, Tq, H, D) contiguous
    lse_ptr,  # (B, H, Tq) fp32 contiguous
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    B, H, GROUP, total_q, total_k, left, right, scale, softcap, threshold, dropout_scale,
    slopes_stride,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    SINKS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Computes out and lse of a block of rows of one head."""
    b, h, block, Tq, Tk, first_q, first_k = place(
        cu_q_ptr, cu_k_ptr, total_q, total_k, H, B, BM, VARLEN
    )
    row_blocks = tl.cdiv(Tq, BM)
    if VARLEN:
        past = block >= row_blocks
        if past:
            return
    # Under causal the last rows see the most keys, so they start first. Neighbouring programs share
    # the keys of one head in L2.
    i0 = (row_blocks - 1 - block) * BM
    bh = b * H + h
    shift = Tk - Tq
    kv_len = Tk
    if LENGTHS:
        kv_len = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Tk)
    slope = 0.0
    if ALIBI:
        slope = load_slope(slopes_ptr, slopes_stride, b, h, B)

    lse_of_none = -INFINITY
    if SINKS:
        lse_of_none = tl.load(sinks_ptr + h)

    rows = i0 + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    q_offsets = tl.arange(0, BM).to(tl.int64)[:, None] * stride_qt + dims[None, :]
    q_first = first_q * stride_qt if VARLEN else b * stride_qb
    q_base = q_ptr + q_first + h * stride_qh + i0.to(tl.int64) * stride_qt
    q = load_rows(q_base, q_offsets, rows < Tq, D, BD, True)

    k_first = first_k * stride_kt if VARLEN else b * stride_kb
    v_first = first_k * stride_vt if VARLEN else b * stride_vb
    k_base = k_ptr + k_first + h // GROUP * stride_kh
    v_base = v_ptr + v_first + h // GROUP * stride_vh
    lo, full_lo, full_hi, hi = key_ranges(
        i0, Tq, shift, left, right, kv_len, BM, BN, HAS_LEFT, HAS_RIGHT
    )

    m = tl.full((BM,), -INFINITY, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    broken = tl.full((), 0, tl.int1)
    # First the blocks of keys that need masks; then, without masks, those that every row sees.
    for masked in tl.static_range(1, -1, -1):
        start, end = (lo, hi - (full_hi - full_lo)) if masked else (full_lo, full_hi)
        for step in tl.range(start, end, BN):
            j0 = step
            if masked:
                j0 += tl.where(step >= full_lo, full_hi - full_lo, 0)
            cols = j0 + tl.arange(0, BN)
            j0_wide = tl.cast(j0, tl.int64)
            k_offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride_kt + dims[None, :]
            k = load_rows(k_base + j0_wide * stride_kt, k_offsets, cols < kv_len, D, BD, masked)
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
            s, factor, _ = scores(
                product,
                rows[:, None],
                cols[None, :],
                shift,
                scale,
                softcap,
                slope,
                SCALED,
                SOFTCAP,
                ALIBI,
            )
            if masked:
                visible = sees(
                    rows[:, None], cols[None, :], shift, left, right, kv_len, HAS_LEFT, HAS_RIGHT
                )
                s = tl.where(visible, s, -INFINITY)
            m_new = tl.maximum(m, tl.max(s, 1) * factor)
            # For a row that has seen no key yet, subtract 0 instead of -inf: its weights become
            # exp2(-inf) = 0.
            m_used = tl.where(m_new == -INFINITY, 0.0, m_new)
            p = tl.exp2(tl.fma(s, factor, -m_used[:, None]))
            rescale = tl.exp2(m - m_used)
            l = l * rescale + tl.sum(p, 1)
            acc *= rescale[:, None]
            m = m_new
            if DROPOUT:
                p = tl.where(attention_keep_tile(rng_ptr, i0, j0, bh, threshold, BM, BN), p, 0.0)
            v_offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride_vt + dims[None, :]
            v = load_rows(v_base + j0_wide * stride_vt, v_offsets, cols < kv_len, D, BD, masked)
            if masked:
                v, broken = without_nonfinite(v, broken)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if broken:
        for j in range(lo, hi):
            lost = nonfinite_part(v_base + tl.cast(j, tl.int64) * stride_vt, D, BD)
            seen = sees(rows, j, shift, left, right, kv_len, HAS_LEFT, HAS_RIGHT)
            acc += tl.where(seen[:, None], lost[None, :], 0.0)

    none = l == 0.0
    factor = dropout_scale
    if SINKS:
        m, l, rescale = with_sink(m, l, lse_of_none)
        factor = rescale * dropout_scale
    l_used = tl.where(l == 0.0, 1.0, l)
    acc *= (factor / l_used)[:, None]
    lse = tl.where(none, lse_of_none, (m + tl.log2(l_used)) / LOG2E)
    lse_first = h * total_q + first_q if VARLEN else bh * Tq
    tl.store(lse_ptr + lse_first + rows, lse, mask=rows < Tq)
    out_offsets = ((first_q + rows.to(tl.int64)) * H + h)[:, None] * D + dims[None, :]
    tl.store(
        out_ptr + out_offsets,
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows < Tq)[:, None] & (dims < D)[None, :],
    )
