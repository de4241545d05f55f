"""Device helpers that the attention kernels share: which keys a row sees, and its scores.

Query i stands at position i + shift among the keys, shift = Tk - Tq (bottom-right alignment). It
sees key j when
    position - left <= j <= position + right   and   j < kv_len,
where an absent bound is compiled away (HAS_LEFT, HAS_RIGHT; causal is right = 0).

    s = scale * q.k;   softcap * tanh(s / softcap);   - slope * |position - j|
all in units of log2(e), for exp2.
"""

import triton
import triton.language as tl

# Differ from call to call, and nothing is gained from a kernel of its own for some of their values.
VARYING = ("B", "Tq", "total_q", "total_k", "left", "right", "threshold")

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def key_ranges(
    i0,
    i1,
    shift,
    left,
    right,
    kv_len,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Keys that the rows i0 <= i < min(i0 + BM, i1) need: (lo, full_lo, full_hi, hi), all but hi
    multiples of BN.

    Blocks from full_lo to full_hi are seen whole by every row and need no mask; the others do.
    """
    lo = 0
    full_lo = 0
    hi = kv_len
    full_hi = kv_len // BN * BN
    if HAS_RIGHT:
        hi = tl.minimum(hi, tl.minimum(i0 + BM, i1) + shift + right)
        full_hi = tl.minimum(full_hi, tl.maximum(i0 + shift + right + 1, 0) // BN * BN)
    if HAS_LEFT:
        lo = tl.maximum(i0 + shift - left, 0) // BN * BN
        full_lo = tl.cdiv(tl.maximum(i0 + BM - 1 + shift - left, 0), BN) * BN
    return lo, full_lo, tl.maximum(full_lo, full_hi), hi


@triton.jit
def query_ranges(
    j0,
    shift,
    left,
    right,
    Tq,
    kv_len,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Rows that see some of the keys j0 <= j < j0 + BN, as in key_ranges with multiples of BM."""
    lo = 0
    full_lo = 0
    hi = Tq
    full_hi = Tq // BM * BM
    if HAS_RIGHT:
        lo = tl.maximum(j0 - shift - right, 0) // BM * BM
        full_lo = tl.cdiv(tl.maximum(j0 + BN - 1 - shift - right, 0), BM) * BM
    if HAS_LEFT:
        hi = tl.minimum(hi, tl.minimum(j0 + BN, kv_len) - shift + left)
        full_hi = tl.minimum(full_hi, tl.maximum(j0 - shift + left + 1, 0) // BM * BM)
    # Keys that reach past the length need their mask in every row; those wholly past it are seen
    # by none.
    if j0 + BN > kv_len:
        full_lo = tl.cdiv(Tq, BM) * BM
    if j0 >= kv_len:
        hi = 0
    return lo, full_lo, tl.maximum(full_lo, full_hi), hi


@triton.jit
def sees(rows, cols, shift, left, right, kv_len, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether each row sees each column; rows and cols broadcast to a tile, either way round."""
    visible = cols < kv_len + rows * 0
    if HAS_RIGHT:
        visible = visible & (cols <= rows + (shift + right))
    if HAS_LEFT:
        visible = visible & (cols >= rows + (shift - left))
    return visible


@triton.jit
def scores(
    product,
    rows,
    cols,
    shift,
    scale,
    softcap,
    slope,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """(s, d): scores in units of log2(e), and d = ds / d(scale * product), 1 without a softcap.

    Not SCALED: the product itself comes back, and the caller folds scale * log2(e) into its exp2 as
    one multiply-add.
    """
    if SCALED:
        if SOFTCAP:
            t = _tanh(product * (scale / softcap))
            s = t * (softcap * LOG2E)
            slope_of_cap = 1.0 - t * t
        else:
            s = product * (scale * LOG2E)
            slope_of_cap = 1.0
        if ALIBI:
            s -= (slope * LOG2E) * tl.abs(rows + shift - cols).to(tl.float32)
    else:
        s = product
        slope_of_cap = 1.0
    return s, slope_of_cap


@triton.jit
def _tanh(x):
    # 2 sigmoid(2x) - 1 cancels near zero, where scores usually are: there Lambert's continued
    # fraction, cut off where its error is below 1e-9. Beyond, little is subtracted from 1.
    x2 = x * x
    over = ((x2 + 378.0) * x2 + 17325.0) * x2 + 135135.0
    under = ((28.0 * x2 + 3150.0) * x2 + 62370.0) * x2 + 135135.0
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 1.0, x * (over / under), tl.where(x < 0.0, -far, far))


@triton.jit
def load_rows(base, offsets, wanted, D, BD: tl.constexpr, MASKED: tl.constexpr):
    """A tile BD wide; columns from D on are zero, and when MASKED so are the rows not wanted."""
    if MASKED:
        mask = wanted[:, None]
        if D != BD:
            mask = mask & (tl.arange(0, BD) < D)[None, :]
        return tl.load(base + offsets, mask=mask, other=0.0)
    elif D != BD:
        return tl.load(base + offsets, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        return tl.load(base + offsets)


@triton.jit
def finite_rows(values):
    """(values with NaN and Inf set to 0, 0 for every finite row and NaN for the others).

    In a gradient the second goes to those who see the row: Inf may show nowhere else, where its
    score is -inf, or finite by a softcap.
    """
    finite = tl.abs(values.to(tl.float32)) < INFINITY
    whole = tl.min(finite.to(tl.int32), 1) == 1
    return tl.where(finite, values, 0.0), tl.where(whole, 0.0, float("nan"))


@triton.jit
def without_nonfinite(values, found):
    """(values with NaN and Inf set to 0, found or whether there were any).

    A weight is 0 where a row does not see a key, but 0 * NaN is NaN: in a product it would reach
    that row all the same. What is taken out here is added after the loops to the rows that see it.
    """
    finite = tl.abs(values.to(tl.float32)) < INFINITY
    return tl.where(finite, values, 0.0), found | (tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0)


@triton.jit
def nonfinite_part(row_ptr, D, BD: tl.constexpr):
    """What without_nonfinite takes out of a row: (BD,) fp32, 0 where the row is finite."""
    dims = tl.arange(0, BD)
    value = tl.load(row_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    return tl.where(tl.abs(value) < INFINITY, 0.0, value)
