"""Attention backward (Dao, "FlashAttention-2", 2023) in three kernels. They use no atomics, so the
same input gives the same bits.

    p = exp(s - lse)                                dp = keep * dropout_scale * (dout . v)
    delta = sum_d dout * out - dlse                 ds = p * (dp - delta) * slope of softcap
    dv = sum_i keep * dropout_scale * p dout        dk = scale * sum_i ds q
    dq = scale * sum_j ds k

delta_kernel computes delta, (B, H, Tq) fp32. sum_d dout * out equals sum_j p dp, with dropout too.

queries_kernel computes dq: each program keeps a block of rows and loops over the keys that the rows
see. For the gradient of ALiBi's slopes it also sums p * (dp - delta) * |position - key| of each row
(by_query, fp32).

keys_kernel computes dk and dv: each program keeps a block of keys and loops over all rows that see
them, of every query head that reads this key head.

Both of them recompute the scores, which makes 7 products instead of 5. Sums are fp32; dq, dk and dv
are contiguous, in the inputs' dtype.

In fp32 (EXACT) the formula for delta is not accurate enough. Where a row has few keys, ds is a
small difference of larger numbers, and the rounding of out, of lse and of the sums would make its
error larger than eager PyTorch's. So queries_kernel first sums p and p * dp itself. Then p is
divided by the sum of p, delta is the sum of p * dp divided by the sum of p, and dlse is added last.
A sink's weight is one more p, whose dp is 0.
"""

import triton
import triton.language as tl

from gptkernels.core.triton_philox import attention_keep_tile
from gptkernels.ops.attention.triton.place import place
from gptkernels.ops.attention.triton.scores import (
    INFINITY,
    LOG2E,
    VARYING,
    finite_rows,
    key_ranges,
    load_rows,
    load_slope,
    query_ranges,
    scores,
    sees,
)


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_delta_kernel(
    out_ptr,  # (B, Tq, H, D) contiguous
    dout_ptr,  # (B, Tq, H, D)
    dlse_ptr,  # (B, H, Tq) fp32 contiguous, read when HAS_DLSE
    delta_ptr,  # (B, H, Tq) fp32
    stride_ob, stride_ot, stride_oh,
    H, Tq,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Computes delta = rowsum(dout * out) - dlse for a block of rows of one head."""
    row_blocks = tl.cdiv(Tq, BM)
    bh = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    b, h, wide = bh // H, bh % H, rows.to(tl.int64)
    inside = (rows < Tq)[:, None] & (dims < D)[None, :]
    out_offsets = ((b * Tq + wide) * H + h)[:, None] * D + dims[None, :]
    dout_offsets = (b * stride_ob + h * stride_oh + wide * stride_ot)[:, None] + dims[None, :]
    out = tl.load(out_ptr + out_offsets, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + dout_offsets, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + bh * Tq + rows, mask=rows < Tq, other=0.0)
    tl.store(delta_ptr + bh * Tq + rows, delta, mask=rows < Tq)


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_keys_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hk, D)
    v_ptr,  # (B, Tk, Hk, D)
    slopes_ptr,  # (H,) or (B, H) fp32, read when ALIBI
    lengths_ptr,  # (B,) int32, read when LENGTHS
    rng_ptr,  # (2,) int64, read when DROPOUT
    cu_q_ptr,  # (B + 1,) int32, read when VARLEN, as the next
    cu_k_ptr,
    dout_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32
    delta_ptr,  # (B, H, Tq) fp32
    total_ptr,  # (B, H, Tq) fp32, read when EXACT
    dlse_ptr,  # (B, H, Tq) fp32 contiguous, read when HAS_DLSE
    dk_ptr,  # (B, Tk, Hk, D) contiguous
    dv_ptr,  # (B, Tk, Hk, D) contiguous
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    B, H, GROUP, total_q, total_k, left, right, scale, softcap, threshold, dropout_scale,
    slopes_stride,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    SINKS: tl.constexpr, EXACT: tl.constexpr, HAS_DLSE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of a block of keys of one key head."""
    key_heads = H // GROUP
    b, hk, block, Tk, Tq, first_k, first_q = place(
        cu_k_ptr, cu_q_ptr, total_k, total_q, key_heads, B, BN, VARLEN
    )
    if VARLEN:
        past = block >= tl.cdiv(Tk, BN)
        if past:
            return
    # Under causal the first keys are seen by the most rows, so they start first.
    j0 = block * BN
    shift = Tk - Tq
    kv_len = Tk
    if LENGTHS:
        kv_len = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Tk)

    cols = j0 + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    j0_wide = j0.to(tl.int64)
    k_first = first_k * stride_kt if VARLEN else b * stride_kb
    v_first = first_k * stride_vt if VARLEN else b * stride_vb
    k_offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride_kt + dims[None, :]
    k = load_rows(
        k_ptr + k_first + hk * stride_kh + j0_wide * stride_kt,
        k_offsets,
        cols < kv_len,
        D,
        BD,
        True,
    )
    v_offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride_vt + dims[None, :]
    v = load_rows(
        v_ptr + v_first + hk * stride_vh + j0_wide * stride_vt,
        v_offsets,
        cols < kv_len,
        D,
        BD,
        True,
    )
    lo, full_lo, full_hi, hi = query_ranges(
        j0, shift, left, right, Tq, kv_len, BM, BN, HAS_LEFT, HAS_RIGHT
    )

    q_first = first_q * stride_qt if VARLEN else b * stride_qb
    dout_first = first_q * stride_ot if VARLEN else b * stride_ob
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    # First the blocks of rows that need masks; then, without masks, those that see every key.
    # One flat loop covers all query heads of the group: a nested loop costs 80 registers.
    for masked in tl.static_range(1, -1, -1):
        start, end = (lo, hi - (full_hi - full_lo)) if masked else (full_lo, full_hi)
        row_blocks = tl.cdiv(tl.maximum(end - start, 0), BM)
        for n in tl.range(0, GROUP * row_blocks):
            i0 = start + n % row_blocks * BM
            if masked:
                i0 += tl.where(i0 >= full_lo, full_hi - full_lo, 0)
            h = hk * GROUP + n // row_blocks
            bh = b * H + h
            q_base = q_ptr + q_first + h * stride_qh
            dout_base = dout_ptr + dout_first + h * stride_oh
            sums = h * total_q + first_q if VARLEN else bh * Tq
            slope = 0.0
            if ALIBI:
                slope = load_slope(slopes_ptr, slopes_stride, b, h, B)
            rows = i0 + tl.arange(0, BM)
            i0_wide = tl.cast(i0, tl.int64)
            if masked:
                lse = tl.load(lse_ptr + sums + rows, mask=rows < Tq, other=-INFINITY)
                delta = tl.load(delta_ptr + sums + rows, mask=rows < Tq, other=0.0)
                # NaN or Inf in a row of q or dout shows in its lse or delta. In a product it would
                # reach keys that the row does not see, since 0 * NaN is NaN. So such a row is read
                # as zeros, and a NaN in lse reaches the keys that it does see.
                sound = (tl.abs(lse) < INFINITY) & (tl.abs(delta) < INFINITY)
                lse = tl.where(sound | (lse == -INFINITY), lse, float("nan"))
            else:
                lse = tl.load(lse_ptr + sums + rows)
                delta = tl.load(delta_ptr + sums + rows)
                sound = rows >= 0
            # A row that sees no key has lse = -inf, and so has a row past the end. The infinity
            # makes their weights 0.
            lse = tl.where(lse == -INFINITY, INFINITY, lse * LOG2E)
            q_offsets = tl.arange(0, BM).to(tl.int64)[:, None] * stride_qt + dims[None, :]
            q = load_rows(q_base + i0_wide * stride_qt, q_offsets, sound, D, BD, masked)
            dout_offsets = tl.arange(0, BM).to(tl.int64)[:, None] * stride_ot + dims[None, :]
            dout = load_rows(dout_base + i0_wide * stride_ot, dout_offsets, sound, D, BD, masked)
            # The tile is (keys, rows), so that p and ds can be left operands without a transpose.
            product = tl.dot(k, tl.trans(q), input_precision="ieee")
            # With a sink the lse of a row without keys, or whose scores are all -inf, is finite.
            if masked and (SOFTCAP or SINKS):
                q, tainted = finite_rows(q)
            s, factor, slope_of_cap = scores(
                product,
                rows[None, :],
                cols[:, None],
                shift,
                scale,
                softcap,
                slope,
                SCALED,
                SOFTCAP,
                ALIBI,
            )
            p = tl.exp2(tl.fma(s, factor, -lse[None, :]))
            if EXACT:
                total = tl.load(total_ptr + sums + rows, mask=rows < Tq, other=1.0)
                p = tl.div_rn(p, tl.zeros_like(p) + total[None, :])
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            kept = p
            if DROPOUT:
                keep = tl.trans(attention_keep_tile(rng_ptr, i0, j0, bh, threshold, BM, BN))
                kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            dp -= delta[None, :]
            if HAS_DLSE:
                dp += tl.load(dlse_ptr + sums + rows, mask=rows < Tq, other=0.0)[None, :]
            ds = p * dp * slope_of_cap
            if masked:
                if SOFTCAP or SINKS:
                    ds += tainted[None, :]
                visible = sees(
                    rows[None, :], cols[:, None], shift, left, right, kv_len, HAS_LEFT, HAS_RIGHT
                )
                visible = visible & (rows < Tq)[None, :]
                kept = tl.where(visible, kept, 0.0)
                ds = tl.where(visible, ds, 0.0)
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_offsets = ((first_k + cols.to(tl.int64)) * key_heads + hk)[:, None] * D + dims[None, :]
    inside = (cols < Tk)[:, None] & (dims < D)[None, :]
    tl.store(dk_ptr + dk_offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + dk_offsets, (dv * dropout_scale).to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_queries_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hk, D)
    v_ptr,  # (B, Tk, Hk, D)
    slopes_ptr,  # (H,) or (B, H) fp32, read when ALIBI
    lengths_ptr,  # (B,) int32, read when LENGTHS
    rng_ptr,  # (2,) int64, read when DROPOUT
    cu_q_ptr,  # (B + 1,) int32, read when VARLEN, as the next
    cu_k_ptr,
    dout_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) fp32
    delta_ptr,  # (B, H, Tq) fp32, written when EXACT
    total_ptr,  # (B, H, Tq) fp32, written when EXACT
    dlse_ptr,  # (B, H, Tq) fp32 contiguous, read when HAS_DLSE
    sinks_ptr,  # (H,) fp32, read when SINKS and EXACT
    dq_ptr,  # (B, Tq, H, D) contiguous
    by_query_ptr,  # (B, H, Tq) fp32 contiguous, written when BY_QUERY
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh,
    B, H, GROUP, total_q, total_k, left, right, scale, softcap, threshold, dropout_scale,
    slopes_stride,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    SINKS: tl.constexpr, EXACT: tl.constexpr, HAS_DLSE: tl.constexpr, VARLEN: tl.constexpr,
    BY_QUERY: tl.constexpr,
):  # fmt: skip
    """Computes dq, and by_query, of a block of rows of one head."""
    b, h, block, Tq, Tk, first_q, first_k = place(
        cu_q_ptr, cu_k_ptr, total_q, total_k, H, B, BM, VARLEN
    )
    row_blocks = tl.cdiv(Tq, BM)
    if VARLEN:
        past = block >= row_blocks
        if past:
            return
    i0 = (row_blocks - 1 - block) * BM
    bh = b * H + h
    shift = Tk - Tq
    kv_len = Tk
    if LENGTHS:
        kv_len = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Tk)
    slope = 0.0
    if ALIBI:
        slope = load_slope(slopes_ptr, slopes_stride, b, h, B)

    rows = i0 + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    i0_wide = i0.to(tl.int64)
    q_offsets = tl.arange(0, BM).to(tl.int64)[:, None] * stride_qt + dims[None, :]
    q_first = first_q * stride_qt if VARLEN else b * stride_qb
    q = load_rows(
        q_ptr + q_first + h * stride_qh + i0_wide * stride_qt,
        q_offsets,
        rows < Tq,
        D,
        BD,
        True,
    )
    dout_offsets = tl.arange(0, BM).to(tl.int64)[:, None] * stride_ot + dims[None, :]
    dout_first = first_q * stride_ot if VARLEN else b * stride_ob
    dout_base = dout_ptr + dout_first + h * stride_oh + i0_wide * stride_ot
    dout = load_rows(dout_base, dout_offsets, rows < Tq, D, BD, True)
    sums = h * total_q + first_q if VARLEN else bh * Tq
    lse = tl.load(lse_ptr + sums + rows, mask=rows < Tq, other=-INFINITY)
    lse = tl.where(lse == -INFINITY, INFINITY, lse * LOG2E)
    if EXACT:
        delta = tl.zeros((BM,), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        if SINKS:
            total = tl.exp2(tl.fma(tl.load(sinks_ptr + h), LOG2E, -lse))
            # NaN in dout has to show in delta, also where the row sees no key.
            _, delta = finite_rows(dout)
    else:
        delta = tl.load(delta_ptr + sums + rows, mask=rows < Tq, other=0.0)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + sums + rows, mask=rows < Tq, other=0.0)

    k_first = first_k * stride_kt if VARLEN else b * stride_kb
    v_first = first_k * stride_vt if VARLEN else b * stride_vb
    k_base = k_ptr + k_first + h // GROUP * stride_kh
    v_base = v_ptr + v_first + h // GROUP * stride_vh
    lo, full_lo, full_hi, hi = key_ranges(
        i0, Tq, shift, left, right, kv_len, BM, BN, HAS_LEFT, HAS_RIGHT
    )
    dq = tl.zeros((BM, BD), tl.float32)
    if BY_QUERY:
        by_query = tl.zeros((BM,), tl.float32)
    # EXACT loops over the keys twice: first for delta, then for dq.
    for summing in tl.static_range(1 if EXACT else 0, -1, -1):
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
                v_offsets = tl.arange(0, BN).to(tl.int64)[:, None] * stride_vt + dims[None, :]
                v = load_rows(v_base + j0_wide * stride_vt, v_offsets, cols < kv_len, D, BD, masked)
                product = tl.dot(q, tl.trans(k), input_precision="ieee")
                s, factor, slope_of_cap = scores(
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
                p = tl.exp2(tl.fma(s, factor, -lse[:, None]))
                dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
                if DROPOUT:
                    keep = attention_keep_tile(rng_ptr, i0, j0, bh, threshold, BM, BN)
                    dp = tl.where(keep, dp * dropout_scale, 0.0)
                if masked:
                    visible = sees(
                        rows[:, None],
                        cols[None, :],
                        shift,
                        left,
                        right,
                        kv_len,
                        HAS_LEFT,
                        HAS_RIGHT,
                    )
                    p = tl.where(visible, p, 0.0)
                    dp = tl.where(visible, dp, 0.0)
                    k, tainted = finite_rows(k)
                if summing:
                    delta += tl.sum(p * dp, 1)
                    total += tl.sum(p, 1)
                else:
                    if EXACT:
                        p = tl.div_rn(p, tl.zeros_like(p) + total[:, None])
                    dp -= delta[:, None]
                    if HAS_DLSE:
                        dp += dlse[:, None]
                    ds = p * dp
                    if BY_QUERY:
                        away = tl.abs(rows[:, None] + shift - cols[None, :])
                        moved = ds * away.to(tl.float32)
                        if masked:
                            moved = tl.where(visible, moved + tainted[None, :], 0.0)
                        by_query += tl.sum(moved, 1)
                    ds = ds * slope_of_cap
                    if masked:  # delta may be NaN, so hidden pairs are set to 0 here as well
                        ds = tl.where(visible, ds + tainted[None, :], 0.0)
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if summing:
            total = tl.where(total == 0.0, 1.0, total)
            delta = tl.div_rn(delta, total)
            tl.store(delta_ptr + sums + rows, delta, mask=rows < Tq)
            tl.store(total_ptr + sums + rows, total, mask=rows < Tq)

    dq_offsets = ((first_q + rows.to(tl.int64)) * H + h)[:, None] * D + dims[None, :]
    inside = (rows < Tq)[:, None] & (dims < D)[None, :]
    tl.store(dq_ptr + dq_offsets, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
    if BY_QUERY:
        tl.store(by_query_ptr + sums + rows, by_query, mask=rows < Tq)
