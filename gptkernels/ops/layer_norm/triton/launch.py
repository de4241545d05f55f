"""LayerNorm with dropout and residual, in Triton: the launchers.

    s = dropout(x) + residual, rounded to the sum's dtype
    mean, rstd: of the rounded s, over C, in fp32
    y = (s - mean) * rstd * weight + bias
backward, with g = dy * weight and x^ = (s - mean) * rstd:
    ds_total = rstd * (g - mean(g) - x^ * mean(g x^)) + dsum
    dresidual = ds_total        dx = dropout'(ds_total)
    dweight = sum over rows of dy x^        dbias = sum over rows of dy

Shapes: x, residual, y, s (M, C); weight, bias (C,); mean, rstd (M,). dsum is the gradient that
arrives through the returned s.
Bytes (the minimum): forward reads x and residual, and writes y and s. Backward reads dy, dsum and
s, and writes dx (and dresidual where it differs from dx by dropout or dtype). Saved for the
backward pass: s (x itself where s is x), mean and rstd in fp32, and the dropout seed; no mask.

A row of up to 8,192 columns stays in registers, so everything is read once. The `_wide` kernels
take wider rows: they loop over chunks of columns, and read a row again from L2.

Gradients of weight and bias: each program sums its own rows, and a second small kernel adds the
programs' sums in a fixed order. Without atomics the bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from gptkernels.core import philox
from gptkernels.core.triton_support import Shipped, Tile, multiprocessors, on_device
from gptkernels.ops.layer_norm.outputs import bwd_outputs, fwd_outputs, matrix
from gptkernels.ops.layer_norm.triton.bwd import (
    backward_kernel,
    backward_wide_kernel,
    reduce_kernel,
    weights_wide_kernel,
)
from gptkernels.ops.layer_norm.triton.fwd import forward_kernel, forward_wide_kernel

_WIDEST_IN_REGISTERS = 8192
_WIDE_CHUNK = 4096
# Elements of a tile of 8 warps; several narrow rows share one tile. Forward each thread holds 16
# elements. Backward holds six values of each element, so a thread gets half as many elements: with
# more than 128 registers a thread, few threads would fit on a multiprocessor.
_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 4096, 2048
_REDUCE_ROWS, _REDUCE_COLS, _REDUCE_WARPS = 64, 32, 4
_STAGES = 3  # Triton's own choice; no loop has a product, so none is pipelined


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (..., C)
    rng: Tensor | None,  # (2,) int64
    dropout_p: float,
    eps: float,
    sum_dtype: torch.dtype | None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s, mean and rstd. s is empty if sum_dtype is None: s is x then. A `tile` runs in
    place of the chosen one."""
    C = x.shape[-1]
    rows, residual_rows = matrix(x), None if residual is None else matrix(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    M = rows.shape[0]
    y, s, mean, rstd = fwd_outputs(x, sum_dtype)
    if x.numel() == 0:
        return y, s, mean, rstd
    strides = (rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0))
    arguments = (
        rows, residual_rows, weight, bias, rng, y, s, mean, rstd, M, C, *strides,
        eps, philox.threshold(dropout_p), philox.scale(dropout_p),
        residual is not None, bias is not None, dropout_p > 0, sum_dtype is not None,
        _aligned(C, *strides),
    )  # fmt: skip
    tile_rows, tile_cols, warps, stages = tile or _tile(C, _FORWARD_ELEMENTS)
    kernel = forward_kernel if C <= _WIDEST_IN_REGISTERS else forward_wide_kernel
    with on_device(x):
        kernel[(triton.cdiv(M, tile_rows),)](
            *arguments, tile_rows, tile_cols,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
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
    weight_gradient: bool,
    bias_gradient: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dresidual, dweight and dbias, each empty as in `op.layer_norm_bwd`. A `tile` runs
    in place of the chosen one."""
    C = s.shape[-1]
    rows = matrix(s)
    M = rows.shape[0]
    dx, dresidual, dweight, dbias = bwd_outputs(
        s, weight, x_dtype, residual_dtype, weight_gradient, bias_gradient
    )
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
    weight = weight.contiguous()
    tile_rows, tile_cols, warps, stages = tile or _tile(C, _BACKWARD_ELEMENTS)
    options = dict(
        ROWS=tile_rows, COLS=tile_cols, num_warps=warps, num_stages=stages, enable_fp_fusion=True
    )
    programs = min(triton.cdiv(M, tile_rows), multiprocessors(s) * _programs_per_multiprocessor(C))
    partial_dweight, partial_dbias = (
        torch.empty((programs if wanted else 0, C), dtype=torch.float32, device=s.device)
        for wanted in (weight_gradient, bias_gradient)
    )
    stride = rows.stride(0)
    inputs = (dy, dsum, rows, mean, rstd, weight, rng, dx, dresidual)
    sizes = (M, C, stride, philox.threshold(dropout_p), philox.scale(dropout_p))
    flags = (dsum is not None, residual_dtype is not None, dropout_p > 0, _aligned(C, stride))
    partials = (partial_dweight, partial_dbias)
    wanted = (weight_gradient, bias_gradient)
    with on_device(s):
        if C <= _WIDEST_IN_REGISTERS:
            backward_kernel[(programs,)](
                *inputs, *partials, *sizes, programs, *flags, *wanted, **options
            )
        else:
            backward_wide_kernel[(M,)](*inputs, *sizes, *flags, **options)
            if any(wanted):
                weights_wide_kernel[(programs * triton.cdiv(C, tile_cols),)](
                    dy, rows, mean, rstd, *partials, M, C, stride, programs, *wanted, **options
                )
        if any(wanted):
            reduce_kernel[(triton.cdiv(C, _REDUCE_COLS),)](
                *partials, dweight, dbias, programs, C, *wanted, _REDUCE_ROWS, _REDUCE_COLS,
                num_warps=_REDUCE_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return dx, dresidual, dweight, dbias


def forward_tiles(x: Tensor) -> dict[str, list[Tile]]:
    """Returns the tiles for x, by the launcher's keyword: first the chosen one, then the backward
    pass's."""
    return {"tile": _tiles(x, _FORWARD_ELEMENTS, _BACKWARD_ELEMENTS)}


def backward_tiles(x: Tensor) -> dict[str, list[Tile]]:
    """As `forward_tiles`, for the backward pass."""
    return {"tile": _tiles(x, _BACKWARD_ELEMENTS, _FORWARD_ELEMENTS)}


def _tiles(x: Tensor, *elements: int) -> list[Tile]:
    return list(dict.fromkeys(_tile(x.shape[-1], number) for number in elements))


def _aligned(*sizes: int) -> bool:
    """Whether all sizes are multiples of 8 elements. Then rows start where a 16-byte access and a
    Philox call do."""
    return all(size % 8 == 0 for size in sizes)


def _tile(C: int, elements: int) -> tuple[int, int, int, int]:
    """Returns the rows, columns, warps and stages of a program, such that 8 warps hold
    `elements`."""
    if C > _WIDEST_IN_REGISTERS:
        return 1, _WIDE_CHUNK, 8, _STAGES
    cols = max(16, triton.next_power_of_2(C))
    rows = max(1, min(16, elements // cols))
    return rows, cols, max(1, min(16, rows * cols * 8 // elements)), _STAGES


def _programs_per_multiprocessor(C: int) -> int:
    """Returns a number of programs that is enough to keep memory busy, and so small that their
    partial sums take few bytes compared with the rows."""
    return 8 if C <= 256 else 4 if C <= 1024 else 2 if C <= 4096 else 1


def shipped() -> Iterator[Shipped]:
    """Yields the configurations for the ahead-of-time compile: every kernel with every option on,
    which takes the most registers.

    Every tile of `_tile` is compiled for the mixture of dtypes that a pre-norm model has under
    autocast; some tiles also for a single dtype.
    """
    mixed = {"x_ptr": "*bf16", "y_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16"}
    for C in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        yield _shipped(forward_kernel, "fwd", C, "bf16/fp32", mixed, "*fp32")
        yield _shipped(backward_kernel, "bwd", C, "bf16/fp32", mixed, "*fp32")
    for dtype in ("fp32", "bf16", "fp16"):
        for C in (1024, 8192):
            yield _shipped(forward_kernel, "fwd", C, dtype, {}, f"*{dtype}")
            yield _shipped(backward_kernel, "bwd", C, dtype, {}, f"*{dtype}")
        for kernel, name in (
            (forward_wide_kernel, "fwd_wide"),
            (backward_wide_kernel, "bwd_wide"),
            (weights_wide_kernel, "bwd_weights_wide"),
            (reduce_kernel, "bwd_reduce"),
        ):
            yield _shipped(kernel, name, 65536, dtype, {}, f"*{dtype}")


def _shipped(
    kernel: Any, name: str, C: int, dtypes: str, pointers: dict[str, str], other_pointers: str
) -> Shipped:
    elements = _FORWARD_ELEMENTS if name.startswith("fwd") else _BACKWARD_ELEMENTS
    rows, cols, warps, stages = _tile(C, elements)
    types = {
        "rng_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
        "partial_dweight_ptr": "*fp32", "partial_dbias_ptr": "*fp32",
        "M": "i32", "C": "i32", "programs": "i32", "threshold": "i32",
        "x_stride": "i32", "residual_stride": "i32", "sum_stride": "i32",
        "eps": "fp32", "scale": "fp32",
    } | pointers  # fmt: skip
    if kernel is reduce_kernel:
        rows, cols, warps = _REDUCE_ROWS, _REDUCE_COLS, _REDUCE_WARPS
    else:  # dweight_ptr and dbias_ptr take each program's own sums
        types |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
    switches = [n for n in kernel.arg_names if n.isupper() and n not in ("M", "C")]
    constexprs = {n: {"ROWS": rows, "COLS": cols}.get(n, True) for n in switches}
    signature = {
        n: "constexpr" if n in constexprs else types.get(n, other_pointers)
        for n in kernel.arg_names
    }
    aligned = tuple(n for n in signature if n.endswith(("_ptr", "stride")) or n == "C")
    label = f"layer_norm_{name} C{C} {dtypes}"
    return Shipped(label, kernel, signature, constexprs, warps, stages, aligned)
