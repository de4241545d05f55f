"""The kernels of LayerNorm backward. The formulas, shapes and bytes are in `launch`."""

import triton
import triton.language as tl

from gptkernels.core.triton_philox import elementwise_keep_tile
from gptkernels.ops.layer_norm.triton.fwd import VARYING, multiple_of_8


@triton.jit
def _store_input_gradients(
    ds_total, dsum_ptr, dx_ptr, dresidual_ptr, rng_ptr, row0, col0, M, C, threshold, scale,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient dsum that arrives through s, and stores the total as dresidual and, after
    dropout, as dx."""
    rows = (row0 + tl.arange(0, ROWS))[:, None]
    cols = (col0 + tl.arange(0, COLS))[None, :]
    inside = (rows < M) & (cols < C)
    if HAS_DSUM:
        ds_total += tl.load(dsum_ptr + rows * C + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DRESIDUAL:
        tl.store(
            dresidual_ptr + rows * C + cols,
            ds_total.to(dresidual_ptr.dtype.element_ty),
            mask=inside,
        )
    if DROPOUT:
        keep = elementwise_keep_tile(rng_ptr, row0, C, col0, threshold, ROWS, COLS, ALIGNED)
        ds_total = tl.where(keep, ds_total * scale, 0.0)
    tl.store(dx_ptr + rows * C + cols, ds_total.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    dy_ptr, dsum_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C), rows sum_stride apart
    mean_ptr, rstd_ptr,  # (M,) fp32
    weight_ptr,  # (C,)
    rng_ptr,  # (2,) int64
    dx_ptr, dresidual_ptr,  # (M, C) contiguous
    dweight_ptr, dbias_ptr,  # (programs, C) fp32: this program's sums
    M, C, sum_stride, threshold, scale, programs,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Computes the input gradients of ROWS rows at a time, which stay in registers, and this
    program's sums for dweight and dbias."""
    if ALIGNED:
        C = multiple_of_8(C)
        sum_stride = multiple_of_8(sum_stride)
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    # The tile's rows are summed only at the end, so warps exchange nothing inside the loop.
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), programs):
        row0 = tl.cast(tile, tl.int64) * ROWS
        rows = row0 + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < C)
        s = tl.load(sum_ptr + rows[:, None] * sum_stride + cols, mask=inside, other=0.0).to(
            tl.float32
        )
        dy = tl.load(dy_ptr + rows[:, None] * C + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        normalised = (s - mean) * rstd
        if WEIGHT_GRADIENT:
            dweight += dy * normalised
        if BIAS_GRADIENT:
            dbias += dy
        g = dy * weight
        mean_g = tl.sum(g, axis=1)[:, None] / C
        mean_g_normalised = tl.sum(g * normalised, axis=1)[:, None] / C
        ds_total = rstd * (g - mean_g - normalised * mean_g_normalised)
        _store_input_gradients(
            ds_total, dsum_ptr, dx_ptr, dresidual_ptr, rng_ptr, row0, 0, M, C, threshold, scale,
            HAS_DSUM, HAS_DRESIDUAL, DROPOUT, ALIGNED, ROWS, COLS,
        )  # fmt: skip
    at = program.to(tl.int64) * C + tl.arange(0, COLS)
    if WEIGHT_GRADIENT:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=tl.arange(0, COLS) < C)
    if BIAS_GRADIENT:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=tl.arange(0, COLS) < C)


@triton.jit(do_not_specialize=VARYING)
def backward_wide_kernel(
    dy_ptr, dsum_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, rng_ptr,  # as in backward_kernel
    dx_ptr, dresidual_ptr,
    M, C, sum_stride, threshold, scale,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Computes the input gradients of one row, in two passes over chunks of its columns. The second
    pass reads from L2."""
    if ALIGNED:
        C = multiple_of_8(C)
        sum_stride = multiple_of_8(sum_stride)
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    sum_g = tl.zeros((1,), tl.float32)
    sum_g_normalised = tl.zeros((1,), tl.float32)
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(sum_ptr + row * sum_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        sum_g += tl.sum(g, axis=1)
        sum_g_normalised += tl.sum(g * (s - mean) * rstd, axis=1)
    mean_g, mean_g_normalised = (sum_g / C)[:, None], (sum_g_normalised / C)[:, None]
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(sum_ptr + row * sum_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
        g = dy * tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        ds_total = rstd * (g - mean_g - (s - mean) * rstd * mean_g_normalised)
        _store_input_gradients(
            ds_total, dsum_ptr, dx_ptr, dresidual_ptr, rng_ptr, row, col0, M, C, threshold, scale,
            HAS_DSUM, HAS_DRESIDUAL, DROPOUT, ALIGNED, ROWS, COLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def weights_wide_kernel(
    dy_ptr, sum_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,  # as in backward_kernel
    M, C, sum_stride, programs,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (p, chunk) sums the columns of one chunk over the tiles of rows p, p + programs,
    p + 2 * programs and so on."""
    program, chunk = tl.program_id(0) % programs, tl.program_id(0) // programs
    cols = chunk * COLS + tl.arange(0, COLS)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), programs):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < C)[None, :]
        s = tl.load(
            sum_ptr + rows[:, None] * sum_stride + cols[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        if WEIGHT_GRADIENT:
            dweight += dy * (s - mean) * rstd
        if BIAS_GRADIENT:
            dbias += dy
    at = program.to(tl.int64) * C + cols
    if WEIGHT_GRADIENT:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=cols < C)
    if BIAS_GRADIENT:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=cols < C)


@triton.jit(do_not_specialize=VARYING)
def reduce_kernel(
    partial_dweight_ptr, partial_dbias_ptr,  # (programs, C) fp32
    dweight_ptr, dbias_ptr,  # (C,)
    programs, C,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The second stage: adds the programs' sums in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for row0 in range(0, programs, ROWS):
        rows = row0 + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        if WEIGHT_GRADIENT:
            dweight += tl.load(partial_dweight_ptr + at, mask=inside, other=0.0)
        if BIAS_GRADIENT:
            dbias += tl.load(partial_dbias_ptr + at, mask=inside, other=0.0)
    if WEIGHT_GRADIENT:
        total = tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + cols, total, mask=cols < C)
    if BIAS_GRADIENT:
        total = tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + cols, total, mask=cols < C)
