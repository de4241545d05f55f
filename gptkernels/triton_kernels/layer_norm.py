"""LayerNorm with dropout and residual, in Triton.

    s = dropout(x) + residual, rounded to the sum's dtype
    mean, rstd: of the rounded s, over C, in fp32
    y = (s - mean) * rstd * weight + bias
backward, with g = dy * weight and x^ = (s - mean) * rstd:
    ds_total = rstd * (g - mean(g) - x^ * mean(g x^)) + ds
    dresidual = ds_total        dx = dropout'(ds_total)
    dweight = sum over rows of dy x^        dbias = sum over rows of dy

Shapes: x, residual, y, s (M, C); weight, bias (C,); mean, rstd (M,).
Bytes (the floor): forward reads x, residual and writes y, s; backward reads dy, ds, s and writes
dx (and dresidual where dropout or a dtype tells them apart). Saved for backward: s (x itself where
s is x), mean and rstd in fp32, the dropout seed, never a mask.

Up to 8,192 columns a row stays in registers, so everything is read once. Wider rows go through the
`_wide` kernels, which loop over chunks of columns and read a row again from L2. Gradients of
weight and bias: each program sums its own rows, a second small kernel adds the programs' sums in a
fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels import philox
from gptkernels.triton_kernels import Shipped, multiprocessors, on_device
from gptkernels.triton_kernels.philox import elementwise_keep_tile

_WIDEST_IN_REGISTERS = 8192
_WIDE_CHUNK = 4096
_TILE_ELEMENTS = 4096  # 8 warps x 16 elements a thread: narrow rows share a program
_REDUCE_ROWS, _REDUCE_COLS, _REDUCE_WARPS = 64, 32, 4


@triton.jit
def _sum_tile(
    x_ptr, residual_ptr, sum_ptr, rng_ptr, row0, col0, M, C, x_stride, residual_stride,
    threshold, scale,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, HAS_SUM: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of s, rounded to its dtype, as fp32; stored where the caller wants s. Zero outside
    the matrix."""
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # elements may pass 2**31
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


@triton.jit
def _layer_norm_fwd_kernel(
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
    row0 = tl.program_id(0) * ROWS
    s = _sum_tile(
        x_ptr, residual_ptr, sum_ptr, rng_ptr, row0, 0, M, C, x_stride, residual_stride,
        threshold, scale, HAS_RESIDUAL, DROPOUT, HAS_SUM, ALIGNED, ROWS, COLS,
    )  # fmt: skip
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, COLS)[None, :]
    mean = tl.sum(s, axis=1) / C
    # Two passes over registers: E[s^2] - mean^2 would cancel. Lanes past C are zeroed after
    # centring.
    centred = tl.where(cols < C, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = _affine_tile(s, mean[:, None], rstd[:, None], weight_ptr, bias_ptr, cols, C, HAS_BIAS)
    inside = (rows < M)[:, None] & (cols < C)
    tl.store(y_ptr + rows[:, None] * C + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, rng_ptr,  # as above
    y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    M, C, x_stride, residual_stride, eps, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1,), tl.float32)
    for col0 in range(0, C, COLS):
        s = _sum_tile(
            x_ptr, residual_ptr, sum_ptr, rng_ptr, row, col0, M, C, x_stride, residual_stride,
            threshold, scale, HAS_RESIDUAL, DROPOUT, HAS_SUM, ALIGNED, 1, COLS,
        )  # fmt: skip
        total += tl.sum(s, axis=1)
    mean = total / C
    # The next passes read s back as it was rounded. Another thread of this program may have
    # written it.
    tl.debug_barrier()
    if HAS_SUM:
        s_ptr = sum_ptr + row * C
    else:
        s_ptr = x_ptr + row * x_stride
    squares = tl.zeros((1,), tl.float32)
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(s_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        centred = tl.where(cols < C, s - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt(squares / C + eps)
    tl.store(mean_ptr + row + tl.arange(0, 1), mean)
    tl.store(rstd_ptr + row + tl.arange(0, 1), rstd)
    for col0 in range(0, C, COLS):
        cols = (col0 + tl.arange(0, COLS))[None, :]
        s = tl.load(s_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = _affine_tile(s, mean[:, None], rstd[:, None], weight_ptr, bias_ptr, cols, C, HAS_BIAS)
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _store_input_gradients(
    ds_total, dsum_ptr, dx_ptr, dresidual_ptr, rng_ptr, row0, col0, M, C, threshold, scale,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add the gradient that arrives through s, then split the total between the residual and
    dropout's input."""
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # elements may pass 2**31
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


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dsum_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C), rows sum_stride apart
    mean_ptr, rstd_ptr,  # (M,) fp32
    weight_ptr,  # (C,)
    rng_ptr,  # (2,) int64
    dx_ptr, dresidual_ptr,  # (M, C) contiguous
    dweight_ptr, dbias_ptr,  # (programs, C) fp32: this program's sums
    M, C, sum_stride, threshold, scale, programs,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    # Summed over the tile's rows only at the end: no exchange between warps inside the loop.
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), programs):
        row0 = tile * ROWS
        rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < M)[:, None] & (cols < C)
        s = tl.load(sum_ptr + rows[:, None] * sum_stride + cols, mask=inside, other=0.0).to(
            tl.float32
        )
        dy = tl.load(dy_ptr + rows[:, None] * C + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        normalised = (s - mean) * rstd
        dweight += dy * normalised
        if HAS_BIAS:
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
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=tl.arange(0, COLS) < C)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=tl.arange(0, COLS) < C)


@triton.jit
def _layer_norm_bwd_wide_kernel(
    dy_ptr, dsum_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, rng_ptr,  # as above
    dx_ptr, dresidual_ptr,
    M, C, sum_stride, threshold, scale,
    HAS_DSUM: tl.constexpr, HAS_DRESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
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
            HAS_DSUM, HAS_DRESIDUAL, DROPOUT, ALIGNED, 1, COLS,
        )  # fmt: skip


@triton.jit
def _layer_norm_bwd_weights_wide_kernel(
    dy_ptr, sum_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,  # as above
    M, C, sum_stride, programs,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (p, chunk): columns of one chunk, every programs-th tile of rows from p on."""
    program, chunk = tl.program_id(0) % programs, tl.program_id(0) // programs
    cols = chunk * COLS + tl.arange(0, COLS)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), programs):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < M)[:, None] & (cols < C)[None, :]
        s = tl.load(
            sum_ptr + rows[:, None] * sum_stride + cols[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        dweight += dy * (s - mean) * rstd
        if HAS_BIAS:
            dbias += dy
    at = program.to(tl.int64) * C + cols
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=cols < C)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=cols < C)


@triton.jit
def _layer_norm_bwd_reduce_kernel(
    partial_dweight_ptr, partial_dbias_ptr,  # (programs, C) fp32
    dweight_ptr, dbias_ptr,  # (C,)
    programs, C,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for row0 in range(0, programs, ROWS):
        rows = row0 + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & (cols < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + cols[None, :]
        dweight += tl.load(partial_dweight_ptr + at, mask=inside, other=0.0)
        if HAS_BIAS:
            dbias += tl.load(partial_dbias_ptr + at, mask=inside, other=0.0)
    tl.store(
        dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=cols < C
    )
    if HAS_BIAS:
        tl.store(
            dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < C
        )


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (..., C)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty where s is x), mean, rstd."""
    C = x.shape[-1]
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    M = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    has_sum = residual is not None or dropout_p > 0 or sum_dtype != x.dtype
    s = torch.empty(x.shape if has_sum else (0,), dtype=sum_dtype, device=x.device)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, s, mean, rstd
    arguments = (
        rows, residual_rows, weight, bias, rng, y, s, mean, rstd, M, C,
        rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0),
        eps, philox.threshold(dropout_p), philox.scale(dropout_p),
        residual is not None, bias is not None, dropout_p > 0, has_sum, C % 8 == 0,
    )  # fmt: skip
    tile_rows, tile_cols, warps = _tile(C)
    with on_device(x):
        if C > _WIDEST_IN_REGISTERS:
            _layer_norm_fwd_wide_kernel[(M,)](
                *arguments, tile_cols, num_warps=warps, enable_fp_fusion=True
            )
        else:
            _layer_norm_fwd_kernel[(triton.cdiv(M, tile_rows),)](
                *arguments, tile_rows, tile_cols, num_warps=warps, enable_fp_fusion=True
            )
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dsum: Tensor | None,  # (..., C)
    s: Tensor,  # (..., C)
    mean: Tensor,  # (M,)
    rstd: Tensor,  # (M,)
    weight: Tensor,  # (C,)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual (empty where dx serves for it, or without a residual), dweight, dbias."""
    C = s.shape[-1]
    rows = _rows(s)
    M = rows.shape[0]
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    split = residual_dtype is not None and (dropout_p > 0 or residual_dtype != x_dtype)
    dresidual = torch.empty(
        s.shape if split else (0,), dtype=residual_dtype or x_dtype, device=s.device
    )
    if s.numel() == 0:
        dweight = torch.zeros_like(weight)
        return dx, dresidual, dweight, torch.zeros_like(weight) if has_bias else weight.new_empty(0)
    dweight = torch.empty(C, dtype=weight.dtype, device=s.device)
    dbias = torch.empty(C if has_bias else 0, dtype=weight.dtype, device=s.device)
    dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
    tile_rows, tile_cols, warps = _tile(C)
    programs = min(triton.cdiv(M, tile_rows), multiprocessors(s) * _programs_per_multiprocessor(C))
    partial_dweight = torch.empty((programs, C), dtype=torch.float32, device=s.device)
    partial_dbias = torch.empty(
        (programs, C) if has_bias else (0,), dtype=torch.float32, device=s.device
    )
    inputs = (dy, dsum, rows, mean, rstd, weight, rng, dx, dresidual)
    sizes = (M, C, rows.stride(0), philox.threshold(dropout_p), philox.scale(dropout_p))
    flags = (dsum is not None, split)
    with on_device(s):
        if C > _WIDEST_IN_REGISTERS:
            _layer_norm_bwd_wide_kernel[(M,)](
                *inputs,
                *sizes,
                *flags,
                dropout_p > 0,
                C % 8 == 0,
                tile_cols,
                num_warps=warps,
                enable_fp_fusion=True,
            )
            _layer_norm_bwd_weights_wide_kernel[(programs * triton.cdiv(C, tile_cols),)](
                dy, rows, mean, rstd, partial_dweight, partial_dbias, M, C, rows.stride(0),
                programs, has_bias, tile_rows, tile_cols, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _layer_norm_bwd_kernel[(programs,)](
                *inputs, partial_dweight, partial_dbias, *sizes, programs, *flags, has_bias,
                dropout_p > 0, C % 8 == 0, tile_rows, tile_cols, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip
        _layer_norm_bwd_reduce_kernel[(triton.cdiv(C, _REDUCE_COLS),)](
            partial_dweight, partial_dbias, dweight, dbias, programs, C, has_bias, _REDUCE_ROWS,
            _REDUCE_COLS, num_warps=_REDUCE_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dresidual, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    """x as a matrix (M, C) with a unit last stride: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _tile(C: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: 16 elements a thread."""
    if C > _WIDEST_IN_REGISTERS:
        return 1, _WIDE_CHUNK, 8
    cols = max(16, triton.next_power_of_2(C))
    rows = max(1, min(16, _TILE_ELEMENTS // cols))
    return rows, cols, max(1, min(16, rows * cols // 512))


def _programs_per_multiprocessor(C: int) -> int:
    """Enough programs to keep memory busy, few enough that their partial sums stay small beside
    the rows."""
    return 8 if C <= 256 else 4 if C <= 1024 else 2 if C <= 4096 else 1


def shipped() -> Iterator[Shipped]:
    """Every kernel at each tile that `_tile` gives, with every option on: the most registers."""
    for dtype in ("fp32", "bf16", "fp16"):
        for C in (128, 1024, 4096, 8192):
            yield _shipped(_layer_norm_fwd_kernel, "fwd", C, dtype)
            yield _shipped(_layer_norm_bwd_kernel, "bwd", C, dtype)
        yield _shipped(_layer_norm_fwd_wide_kernel, "fwd_wide", 65536, dtype)
        yield _shipped(_layer_norm_bwd_wide_kernel, "bwd_wide", 65536, dtype)
        yield _shipped(_layer_norm_bwd_weights_wide_kernel, "bwd_weights_wide", 65536, dtype)
        yield _shipped(_layer_norm_bwd_reduce_kernel, "bwd_reduce", 1024, dtype)


def _shipped(kernel: Any, name: str, C: int, dtype: str) -> Shipped:
    rows, cols, warps = _tile(C)
    types = {
        "rng_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
        "partial_dweight_ptr": "*fp32", "partial_dbias_ptr": "*fp32",
        "M": "i32", "C": "i32", "programs": "i32", "threshold": "i32",
        "x_stride": "i32", "residual_stride": "i32", "sum_stride": "i32",
        "eps": "fp32", "scale": "fp32",
    }  # fmt: skip
    if kernel is _layer_norm_bwd_reduce_kernel:
        rows, cols, warps = _REDUCE_ROWS, _REDUCE_COLS, _REDUCE_WARPS
    else:  # a program's own sums
        types |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
    switches = [n for n in kernel.arg_names if n.isupper() and n not in ("M", "C")]
    constexprs = {n: {"ROWS": rows, "COLS": cols}.get(n, True) for n in switches}
    signature = {
        n: "constexpr" if n in constexprs else types.get(n, f"*{dtype}") for n in kernel.arg_names
    }
    aligned = tuple(n for n in signature if n.endswith(("_ptr", "stride")) or n == "C")
    label = f"layer_norm_{name} C{C} {dtype}"
    return Shipped(label, kernel, signature, constexprs, warps, 3, aligned)
