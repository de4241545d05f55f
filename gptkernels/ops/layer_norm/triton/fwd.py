"""The kernels of LayerNorm forward. The formulas, shapes and bytes are in `launch`."""

import triton
import triton.language as tl

from gptkernels.core.triton_philox import elementwise_keep_tile

# Arguments that differ from call to call. Triton must not specialise kernels on their values: that
# would compile more kernels without making any faster.
VARYING = ("M", "programs", "threshold")


@triton.jit
def multiple_of_8(size):
    """Returns `size`, which is a multiple of 8, in a form that tells Triton so. Triton itself looks
    for multiples of 16 only, but 8 elements of 16 bits already make a 16-byte access."""
    return size // 8 * 8


@triton.jit
def _sum_tile(
    x_ptr, residual_ptr, sum_ptr, rng_ptr, row0, col0, M, C, x_stride, residual_stride,
    threshold, scale,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, HAS_SUM: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Returns a tile of s, rounded to the dtype of s, as fp32; it is zero outside the matrix. With
    HAS_SUM it also stores the tile."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = (col0 + tl.arange(0, COLS))[None, :]
    inside = (rows < M) & (cols < C)
    s = tl.load(x_ptr + rows * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = elementwise_keep_tile(rng_ptr, row0, C, col0, threshold, ROWS, COLS, ALIGNED)
        s = tl.where(keep, s * scale, 0.0)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + rows * residual_stride + cols, mask=inside, other=0.0).to(
            tl.float32
        )
    if HAS_SUM:
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * C + cols, rounded, mask=inside)
        s = rounded.to(tl.float32)
    return s


@triton.jit
def _affine_tile(s, mean, rstd, weight_ptr, bias_ptr, cols, C, HAS_BIAS: tl.constexpr):
    y = (s - mean) * rstd * tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    residual_ptr,  # (M, C), rows residual_stride apart
    weight_ptr, bias_ptr,  # (C,)
    rng_ptr,  # (2,) int64: seed, offset
    y_ptr, sum_ptr,  # (M, C) contiguous
    mean_ptr, rstd_ptr,  # (M,) fp32
    M, C, x_stride, residual_stride, eps, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Computes ROWS rows, which stay in registers."""
    if ALIGNED:
        C = multiple_of_8(C)
        x_stride = multiple_of_8(x_stride)
        residual_stride = multiple_of_8(residual_stride)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    s = _sum_tile(
        x_ptr, residual_ptr, sum_ptr, rng_ptr, row0, 0, M, C, x_stride, residual_stride,
        threshold, scale, HAS_RESIDUAL, DROPOUT, HAS_SUM, ALIGNED, ROWS, COLS,
    )  # fmt: skip
    rows = row0 + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    mean = tl.sum(s, axis=1) / C
    # Two passes over the registers, since E[s^2] - mean^2 would lose digits by cancellation.
    # Elements past C are set to zero after centring. The mean of the centred row is the rounding
    # error of `mean`: it corrects mean and variance.
    centred = tl.where(cols < C, s - mean[:, None], 0.0)
    shift = tl.sum(centred, axis=1) / C
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C - shift * shift + eps)
    mean += shift
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = _affine_tile(s, mean[:, None], rstd[:, None], weight_ptr, bias_ptr, cols, C, HAS_BIAS)
    inside = (rows < M)[:, None] & (cols < C)
    tl.store(y_ptr + rows[:, None] * C + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr,  # as in forward_kernel
    y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    M, C, x_stride, residual_stride, eps, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Computes one row, in three passes over chunks of its columns. The later passes read from
    L2."""
    if ALIGNED:
        C = multiple_of_8(C)
        x_stride = multiple_of_8(x_stride)
        residual_stride = multiple_of_8(residual_stride)
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1,), tl.float32)
    for col0 in range(0, C, COLS):
        s = _sum_tile(
            x_ptr, residual_ptr, sum_ptr, rng_ptr, row, col0, M, C, x_stride, residual_stride,
            threshold, scale, HAS_RESIDUAL, DROPOUT, HAS_SUM, ALIGNED, ROWS, COLS,
        )  # fmt: skip
        total += tl.sum(s, axis=1)
    mean = total / C
    # The next passes read the rounded s back. Another thread of this program may have written it,
    # so all threads wait here.
    tl.debug_barrier()
    if HAS_SUM:
        s_ptr = sum_ptr + row * C
    else:
        s_ptr = x_ptr + row * x_stride
    squares = tl.zeros((1,), tl.float32)
    shift = tl.zeros((1,), tl.float32)
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(s_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        centred = tl.where(cols < C, s - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
        shift += tl.sum(centred, axis=1)
    shift /= C
    rstd = 1.0 / tl.sqrt(squares / C - shift * shift + eps)
    mean += shift
    tl.store(mean_ptr + row + tl.arange(0, 1), mean)
    tl.store(rstd_ptr + row + tl.arange(0, 1), rstd)
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(s_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = _affine_tile(s, mean[:, None], rstd[:, None], weight_ptr, bias_ptr, cols, C, HAS_BIAS)
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=cols < C)
