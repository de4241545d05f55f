"""Device helpers that the attention kernels share: which keys a row sees, and its scores.

Query i is at position i + shift among the keys, where shift = Tk - Tq (bottom-right alignment). It
sees key j if
    position - left <= j <= position + right   and   j < kv_len,
where an absent bound is compiled away (HAS_LEFT, HAS_RIGHT; causal means right = 0).

    s = scale * q.k;   s = softcap * tanh(s / softcap);   s = s - slope * |position - j|
The kernels compute exp(s - m) as exp2(log2(e) s - log2(e) m), with one multiply-add before exp2. A
score in units of log2(e) would be rounded once more.
"""

import triton
import triton.language as tl

# Arguments that differ from call to call. Triton must not specialise kernels on their values: that
# would compile more kernels without making any faster.
VARYING = ("B", "Tq", "total_q", "total_k", "left", "right", "threshold", "slopes_stride")

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
    """Returns (lo, full_lo, full_hi, hi): the rows i0 <= i < min(i0 + BM, i1) need the keys from lo
    to hi. All but hi are multiples of BN.

    Every row sees all keys from full_lo to full_hi, so blocks there need no mask; the others do.
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
    """Returns (lo, full_lo, full_hi, hi), the rows that see some of the keys j0 <= j < j0 + BN, as
    in key_ranges; all but hi are multiples of BM."""
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
    # A block of keys that reaches past the length needs its mask in every row. No row sees a block
    # that lies wholly past the length.
    if j0 + BN > kv_len:
        full_lo = tl.cdiv(Tq, BM) * BM
    if j0 >= kv_len:
        hi = 0
    return lo, full_lo, tl.maximum(full_lo, full_hi), hi


@triton.jit
def sees(rows, cols, shift, left, right, kv_len, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether each row (query) sees each column (key). rows and cols broadcast to a tile, in either
    orientation."""
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
    """Returns (s, factor, d): exp2(s * factor) is exp of the score, and d is the derivative of the
    score by scale * product, which is 1 without a softcap.

    Not SCALED: s is the product itself, and the factor holds the scale.
    """
    if SCALED:
        factor = LOG2E
        if SOFTCAP:
            t = _tanh(product * (scale / softcap))
            s = softcap * t
            slope_of_cap = 1.0 - t * t
        else:
            s = product * scale
            slope_of_cap = 1.0
        if ALIBI:
            s = tl.fma(-slope, tl.abs(rows + shift - cols).to(tl.float32), s)
    else:
        factor = scale * LOG2E
        s = product
        slope_of_cap = 1.0
    return s, factor, slope_of_cap


@triton.jit
def with_sink(m, l, sink):
    """Adds one more score, which belongs to no key, to the maximum m of rows, in units of log2(e),
    and to their sum l. Returns (m, l, the factor of their sum of values).

    A sink of -inf changes no bit.
    """
    highest = tl.maximum(m, sink * LOG2E)
    used = tl.where(highest == -INFINITY, 0.0, highest)
    factor = tl.exp2(m - used)
    return highest, l * factor + tl.exp2(tl.fma(sink, LOG2E, -used)), factor


@triton.jit
def _tanh(x):
    # Scores are usually near zero, where 2 sigmoid(2x) - 1 would lose digits by cancellation. So
    # for |x| < 1 this uses Lambert's continued fraction, with an error below 1e-9. For larger |x|
    # the subtraction from 1 loses little.
    x2 = x * x
    over = ((x2 + 378.0) * x2 + 17325.0) * x2 + 135135.0
    under = ((28.0 * x2 + 3150.0) * x2 + 62370.0) * x2 + 135135.0
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 1.0, x * (over / under), tl.where(x < 0.0, -far, far))


@triton.jit
def load_rows(base, offsets, wanted, D, BD: tl.constexpr, MASKED: tl.constexpr):
    """Loads a tile BD wide. Columns from D on are zero; if MASKED, so are the rows that are not
    wanted."""
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
def load_slope(slopes_ptr, stride, b, h, B):
    """Loads the slope of head h. Packed tokens outside of all sequences (`place`) get 0: they see
    no keys."""
    return tl.load(slopes_ptr + b * stride + h, mask=(b >= 0) & (b < B), other=0.0)


@triton.jit
def finite_rows(values):
    """Returns (values with NaN and Inf set to 0, a marker for each row: 0 if finite, else NaN).

    A gradient adds the marker for every pair that sees the row. Without it an Inf could get lost:
    its score may be -inf, or finite because of a softcap.
    """
    finite = tl.abs(values.to(tl.float32)) < INFINITY
    whole = tl.min(finite.to(tl.int32), 1) == 1
    return tl.where(finite, values, 0.0), tl.where(whole, 0.0, float("nan"))


@triton.jit
def without_nonfinite(values, found):
    """Returns (values with NaN and Inf set to 0, `found` or whether there were any).

    The weight of a key that a row does not see is 0, but 0 * NaN is NaN: in a product the NaN would
    reach that row anyway. So NaN and Inf are removed here, and added after the loops to the rows
    that do see their key.
    """
    finite = tl.abs(values.to(tl.float32)) < INFINITY
    return tl.where(finite, values, 0.0), found | (tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0)


@triton.jit
def nonfinite_part(row_ptr, D, BD: tl.constexpr):
    """Returns what without_nonfinite removes from a row: (BD,) fp32, 0 where the row is finite."""
    dims = tl.arange(0, BD)
    value = tl.load(row_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    return tl.where(tl.abs(value) < INFINITY, 0.0, value)
