"""The GELU MLP's Triton kernels, two fused products, and their launchers:
y = gelu(x w1^T + b1) w2^T + b2.

    x (M, C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,), y (M, C)
    h = x w1^T + b1 and a = gelu(h) are (M, F)
    tanh:  gelu(h) = h sigmoid(2u) = 0.5 h (1 + tanh u), u = sqrt(2/pi) (h + 0.044715 h^3)
    none:  gelu(h) = h Phi(h) = h (0.5 + 0.5 erf(h / sqrt 2))

The forward pass has two products. Our kernel computes the first; its epilogue writes a, and h if h
is kept. PyTorch computes y = a w2^T + b2.

The backward pass has four or, with recomputation, five products. Our kernel computes da = dy w2;
its epilogue reads h and writes dh = da gelu'(h), a once more and, for db1, the column sums of dh in
each row tile, (tiles, F) in fp32. PyTorch adds these sums up in a fixed order: without atomics the
bits are the same every time. PyTorch also computes the plain products, which have nothing to fuse:
dw2 = dy^T a, dw1 = dh^T x and dx = dh w1.

Bytes beyond the products' own operands: h, written once and read once. Saved for the backward pass:
x, w1, w2 and h, all in x's dtype; with recomputation x, w1, b1 and w2, and our first kernel
computes h again. Sums are in fp32, and fp32 products run in full precision. The activation is
computed from the stored (rounded) h, so the backward pass rebuilds exactly the bits that the
forward pass used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.core.triton_support import Shipped, Tile, on_device
from gptkernels.ops.gelu_mlp import torch as plain

_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)

# This many row tiles run together for each column tile of the weight, which then stays in L2.
_GROUP = 8

# With fewer large tiles than this, some of the 108 multiprocessors of an A100 would have no work.
_FEW_TILES = 108

# Bytes of shared memory of a thread block that are enough for every tile. This is the limit of an
# A100; H100 and B200 have more.
_AMPLE_SHARED = 163 * 1024


@triton.jit
def _gate_and_bell(h, APPROXIMATE: tl.constexpr):
    """Returns the gate gelu(h) / h and the bell, which is the gate's derivative. For tanh the bell
    lacks the derivative's factor 1 + 3 * 0.044715 h^2.

    The fma are explicit because the compiler might contract the gate differently in two kernels.
    The formulas avoid cancellation and exponentials that overflow.
    """
    if APPROXIMATE == "tanh":
        u = h * tl.fma(h * h, _SQRT_2_OVER_PI * _CUBIC, _SQRT_2_OVER_PI)
        decay = tl.exp(-2.0 * tl.abs(u))
        rest = 1.0 / (1.0 + decay)
        return tl.where(u < 0, decay, 1.0) * rest, (2.0 * _SQRT_2_OVER_PI) * (decay * rest * rest)
    else:
        return tl.fma(tl.erf(h * _SQRT_HALF), 0.5, 0.5), _INV_SQRT_2PI * tl.exp(-0.5 * (h * h))


@triton.jit
def _gelu_slope(h, gate, bell, APPROXIMATE: tl.constexpr):
    """Returns gelu'(h). For large |h| the bell is exactly 0; it is multiplied first, so that powers
    of h cannot overflow."""
    q = h * bell
    if APPROXIMATE == "tanh":
        q += (3.0 * _CUBIC) * (h * (h * q))
    return gate + q


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Returns (row tile, column tile) of a program. Programs go down GROUP row tiles, then on to
    the next column tile."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    place = program - first * tiles_n
    return first + place % height, place // height


# M differs from call to call: kernels specialised on its value would be no faster.
@triton.jit(do_not_specialize=("M",))
def _linear_gelu_kernel(
    x_ptr,  # (M, C), rows stride_x apart
    w1_ptr,  # (F, C), rows stride_w1 apart
    b1_ptr,  # (F,)
    h_ptr,  # (M, F) contiguous, written if STORE_H
    a_ptr,  # (M, F) contiguous, written if STORE_A
    M,
    F,
    C,
    stride_x,
    stride_w1,
    APPROXIMATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    EVEN: tl.constexpr,  # C is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes h = x w1^T + b1 and a = gelu(h), one (BM, BN) tile in each program."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(F, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    row_in, col_in = rows < M, cols < F
    x_tile = x_ptr + rows[:, None] * stride_x + depth[None, :]
    w_tile = w1_ptr + cols[None, :] * stride_w1 + depth[:, None]

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, C, BK):
        if EVEN:
            x = tl.load(x_tile, mask=row_in[:, None], other=0.0)
            w = tl.load(w_tile, mask=col_in[None, :], other=0.0)
        else:
            depth_in = depth < C - start
            x = tl.load(x_tile, mask=row_in[:, None] & depth_in[None, :], other=0.0)
            w = tl.load(w_tile, mask=col_in[None, :] & depth_in[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_tile += BK
        w_tile += BK

    if HAS_BIAS:
        acc += tl.load(b1_ptr + cols, mask=col_in, other=0.0).to(tl.float32)[None, :]
    h = acc.to(a_ptr.dtype.element_ty)
    place = rows[:, None] * F + cols[None, :]
    inside = row_in[:, None] & col_in[None, :]
    if STORE_H:
        tl.store(h_ptr + place, h, mask=inside)
    if STORE_A:
        stored = h.to(tl.float32)
        gate, _ = _gate_and_bell(stored, APPROXIMATE)
        a = stored * gate
        tl.store(a_ptr + place, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradients(
    da,
    h_ptr,
    dh_ptr,
    a_ptr,
    partial_ptr,
    rows,
    cols,
    tile_m,
    M,
    F,
    APPROXIMATE: tl.constexpr,
    STORE_A: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    """The backward epilogue at (rows, cols): stores dh = da gelu'(h), a = gelu(h) and the column
    sums of dh."""
    place = rows[:, None] * F + cols[None, :]
    inside = (rows < M)[:, None] & (cols < F)[None, :]
    h = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate, bell = _gate_and_bell(h, APPROXIMATE)
    if STORE_A:
        tl.store(a_ptr + place, (h * gate).to(a_ptr.dtype.element_ty), mask=inside)
    # Rows past M add exact zeros to the sums, since their dy and h were read as 0.
    dh = da * _gelu_slope(h, gate, bell, APPROXIMATE)
    tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=inside)
    if SUM_COLUMNS:
        tl.store(partial_ptr + tile_m.to(tl.int64) * F + cols, tl.sum(dh, axis=0), mask=cols < F)


# M differs from call to call: kernels specialised on its value would be no faster.
@triton.jit(do_not_specialize=("M",))
def _linear_gelu_backward_kernel(
    dy_ptr,  # (M, C), rows stride_dy apart
    w2_ptr,  # (C, F), rows stride_w2 apart
    h_ptr,  # (M, F) contiguous
    dh_ptr,  # (M, F) contiguous
    a_ptr,  # (M, F) contiguous, written if STORE_A
    partial_ptr,  # (tiles of rows, F) fp32, written if SUM_COLUMNS
    M,
    F,
    C,
    stride_dy,
    stride_w2,
    APPROXIMATE: tl.constexpr,
    STORE_A: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,  # C is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes dh = (dy w2) gelu'(h), a = gelu(h) and the column sums of dh, one (BM, BN) tile in
    each program."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(F, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    row_in, col_in = rows < M, cols < F
    dy_tile = dy_ptr + rows[:, None] * stride_dy + depth[None, :]
    w_tile = w2_ptr + depth.to(tl.int64)[:, None] * stride_w2 + cols[None, :]
    w_step = tl.cast(stride_w2, tl.int64) * BK

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, C, BK):
        if EVEN:
            dy = tl.load(dy_tile, mask=row_in[:, None], other=0.0)
            w = tl.load(w_tile, mask=col_in[None, :], other=0.0)
        else:
            depth_in = depth < C - start
            dy = tl.load(dy_tile, mask=row_in[:, None] & depth_in[None, :], other=0.0)
            w = tl.load(w_tile, mask=col_in[None, :] & depth_in[:, None], other=0.0)
        acc = tl.dot(dy, w, acc, input_precision="ieee")
        dy_tile += BK
        w_tile += w_step

    # The epilogue runs on two halves of the columns. h, its gate and its slope for a whole tile
    # would not fit in the registers: 128 x 128 with 8 warps takes 255 and spills; halves take 190.
    if BN > 64:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        left_cols = tile_n.to(tl.int64) * BN + tl.arange(0, BN // 2)
        _store_gradients(
            left, h_ptr, dh_ptr, a_ptr, partial_ptr, rows, left_cols, tile_m, M, F,
            APPROXIMATE, STORE_A, SUM_COLUMNS,
        )  # fmt: skip
        _store_gradients(
            right, h_ptr, dh_ptr, a_ptr, partial_ptr, rows, left_cols + BN // 2, tile_m, M, F,
            APPROXIMATE, STORE_A, SUM_COLUMNS,
        )  # fmt: skip
    else:
        _store_gradients(
            acc, h_ptr, dh_ptr, a_ptr, partial_ptr, rows, cols, tile_m, M, F,
            APPROXIMATE, STORE_A, SUM_COLUMNS,
        )  # fmt: skip


class _Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


def _tile(rows: int, cols: int, itemsize: int, aligned: bool, shared: int) -> _Tile:
    """Returns the tile for a (rows, cols) result, by element size, alignment, number of tiles and
    shared memory."""
    # Without vector loads every element needs an address. More threads have registers for them.
    if not aligned:
        return _Tile(64, 64, 32, num_warps=8, num_stages=2)
    if itemsize == 4:  # full-precision fp32 uses no tensor cores and keeps operands in registers
        return _Tile(64, 64, 32, num_warps=4, num_stages=3)
    if triton.cdiv(rows, 128) * triton.cdiv(cols, 128) < _FEW_TILES:
        return _Tile(64, 64, 64, num_warps=4, num_stages=4)
    if shared >= _AMPLE_SHARED:
        return _Tile(128, 128, 64, num_warps=8, num_stages=4)
    return _Tile(128, 128, 32, num_warps=8, num_stages=4)


def _tile_for(left: Tensor, right: Tensor, cols: int) -> _Tile:
    """Returns the tile for left (M, K) times right, (cols, K) or (K, cols), on left's device."""
    (rows, depth), strides = left.shape, (left.stride(0), right.stride(0))
    # Triton uses vector loads only where it knows that 16 divides the integer arguments.
    aligned = all(size % 16 == 0 for size in (depth, cols, *strides))
    return _tile(rows, cols, left.element_size(), aligned, _shared_bytes(left.device))


def forward_tiles(x: Tensor, w1: Tensor) -> dict[str, list[Tile]]:
    """Returns the tiles for x w1^T, by the launcher's keyword: first the chosen one, then the
    others for the same size of elements."""
    return {"tile": _tiles(x, w1, w1.shape[0])}


def backward_tiles(dy: Tensor, w2: Tensor) -> dict[str, list[Tile]]:
    """As `forward_tiles`, for dy w2."""
    return {"tile": _tiles(dy, w2, w2.shape[1])}


def _tiles(left: Tensor, right: Tensor, cols: int) -> list[Tile]:
    others = [
        _tile(rows, 1, left.element_size(), aligned, shared)
        for rows in (128 * _FEW_TILES, 1)
        for aligned in (True, False)
        for shared in (_AMPLE_SHARED, 0)
    ]
    return list(dict.fromkeys([_tile_for(left, right, cols), *others]))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Returns the bytes of shared memory that one thread block may use. The interpreter, for CPU
    tensors, has no limit."""
    if device.type != "cuda":
        return _AMPLE_SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the attribute
    return properties.shared_memory_per_block_optin


def gelu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    keep_h: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C) and h (M, F), which is empty unless `keep_h`. Inputs have a last stride of
    1. A `tile` runs in place of the one chosen for the fused product, x w1^T."""
    if not (x.numel() and w1.numel()):  # there is nothing to fuse
        return plain.gelu_mlp_fwd(x, w1, b1, w2, b2, approximate, keep_h)
    a = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
    h = torch.empty_like(a) if keep_h else torch.empty(0, dtype=x.dtype, device=x.device)
    linear_gelu_fwd(x, w1, b1, h if keep_h else None, a, approximate, tile=tile)
    y = torch.mm(a, w2.t()) if b2 is None else torch.addmm(b2, a, w2.t())
    return y, h


def gelu_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    h: Tensor | None,
    approximate: str,
    grad_mask: Sequence[bool],
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dw1, db1, dw2 and db2, each empty where `grad_mask` is False. If h is None, it is
    recomputed. A `tile` runs in place of the one chosen for the fused product, dy w2."""
    if not (x.numel() and w1.numel()):
        return plain.gelu_mlp_bwd(dy, x, w1, b1, w2, h, approximate, grad_mask)
    need_x, need_w1, need_b1, need_w2, need_b2 = grad_mask
    # Five distinct tensors: the outputs of an op must not be one tensor, even if it is empty.
    dx, dw1, db1, dw2, db2 = (torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(5))
    if need_b2:
        db2 = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if not (need_x or need_w1 or need_b1 or need_w2):
        return dx, dw1, db1, dw2, db2
    dy = dy if dy.stride(1) == 1 or dy.shape[1] == 1 else dy.contiguous()
    if h is None:
        h = torch.empty((x.shape[0], w1.shape[0]), dtype=x.dtype, device=x.device)
        linear_gelu_fwd(x, w1, b1, h, None, approximate)
    dh, a, partial = linear_gelu_bwd(dy, w2, h, approximate, need_w2, need_b1, tile=tile)
    if need_b1:
        db1 = partial.sum(0).to(x.dtype)
    if need_w2:
        dw2 = torch.mm(dy.t(), a)
    if need_w1:
        dw1 = torch.mm(dh.t(), x)
    if need_x:
        dx = torch.mm(dh, w1)
    return dx, dw1, db1, dw2, db2


def linear_gelu_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    h: Tensor | None,
    a: Tensor | None,
    approximate: str,
    *,
    tile: Tile | None = None,
) -> None:
    """Fills h and a; either may be None, and is then left out. A `tile` runs in place of the chosen
    one."""
    (rows, width), inner = x.shape, w1.shape[0]
    used = _Tile(*tile) if tile else _tile_for(x, w1, inner)
    with on_device(x):
        _linear_gelu_kernel[(_programs(rows, inner, used),)](
            x,
            w1,
            x if b1 is None else b1,  # even an unused pointer needs some tensor
            a if h is None else h,
            h if a is None else a,
            rows,
            inner,
            width,
            x.stride(0),
            w1.stride(0),
            HAS_BIAS=b1 is not None,
            STORE_H=h is not None,
            STORE_A=a is not None,
            **_constexprs(used, width, approximate),
            num_warps=used.num_warps,
            num_stages=used.num_stages,
            enable_fp_fusion=True,
        )


def linear_gelu_bwd(
    dy: Tensor,
    w2: Tensor,
    h: Tensor,
    approximate: str,
    store_a: bool,
    sum_columns: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dh (M, F); a = gelu(h) (M, F), empty unless `store_a`; and partial column sums of dh
    (tiles, F) in fp32, empty unless `sum_columns`. A `tile` runs in place of the chosen one."""
    (rows, width), inner = dy.shape, w2.shape[1]
    used = _Tile(*tile) if tile else _tile_for(dy, w2, inner)
    tiles = triton.cdiv(rows, used.rows)
    dh = torch.empty((rows, inner), dtype=dy.dtype, device=dy.device)
    a = torch.empty((rows, inner) if store_a else (0,), dtype=dy.dtype, device=dy.device)
    partial = torch.empty(
        (tiles, inner) if sum_columns else (0,), dtype=torch.float32, device=dy.device
    )
    with on_device(dy):
        _linear_gelu_backward_kernel[(_programs(rows, inner, used),)](
            dy,
            w2,
            h,
            dh,
            a,
            partial,
            rows,
            inner,
            width,
            dy.stride(0),
            w2.stride(0),
            STORE_A=store_a,
            SUM_COLUMNS=sum_columns,
            **_constexprs(used, width, approximate),
            num_warps=used.num_warps,
            num_stages=used.num_stages,
            enable_fp_fusion=True,
        )
    return dh, a, partial


def _programs(rows: int, cols: int, tile: _Tile) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)


def _constexprs(tile: _Tile, width: int, approximate: str) -> dict[str, object]:
    return {
        "APPROXIMATE": approximate,
        "EVEN": width % tile.depth == 0,
        "BM": tile.rows,
        "BN": tile.cols,
        "BK": tile.depth,
        "GROUP": _GROUP,
    }


def shipped() -> Iterator[Shipped]:
    """Yields the configurations for the ahead-of-time compile: those for a GPT's shapes, and those
    for odd sizes, which have no vector loads."""
    for dtype, rows, approximate, aligned in (
        ("bf16", 8192, "tanh", True),
        ("bf16", 8192, "none", True),
        ("bf16", 64, "tanh", True),
        ("bf16", 64, "tanh", False),
        ("fp16", 8192, "tanh", True),
        ("fp32", 8192, "tanh", True),
        ("fp32", 8192, "none", False),
    ):
        itemsize = 4 if dtype == "fp32" else 2
        ample, tight = (_tile(rows, 3072, itemsize, aligned, n) for n in (_AMPLE_SHARED, 0))
        if ample == tight:
            yield from _shipped(dtype, ample, approximate, aligned, (80, 86, 90, 100))
        else:
            yield from _shipped(dtype, ample, approximate, aligned, (80, 90, 100))
            yield from _shipped(dtype, tight, approximate, aligned, (86,))


def _shipped(
    dtype: str, tile: _Tile, approximate: str, aligned: bool, architectures: tuple[int, ...]
) -> Iterator[Shipped]:
    size = f"{tile.rows}x{tile.cols}x{tile.depth}" + ("" if aligned else " odd")
    constexprs = _constexprs(tile, tile.depth if aligned else 1, approximate)
    data, integers = f"*{dtype}", dict.fromkeys(("M", "F", "C"), "i32")
    forward = dict.fromkeys(("x_ptr", "w1_ptr", "b1_ptr", "h_ptr", "a_ptr"), data)
    forward |= integers | dict.fromkeys(("stride_x", "stride_w1"), "i32")
    backward = dict.fromkeys(("dy_ptr", "w2_ptr", "h_ptr", "dh_ptr", "a_ptr"), data)
    backward |= {"partial_ptr": "*fp32"} | integers
    backward |= dict.fromkeys(("stride_dy", "stride_w2"), "i32")
    for direction, kernel, signature, flags in (
        ("fwd", _linear_gelu_kernel, forward, ("HAS_BIAS", "STORE_H", "STORE_A")),
        ("bwd", _linear_gelu_backward_kernel, backward, ("STORE_A", "SUM_COLUMNS")),
    ):
        # Tensors that PyTorch allocates are aligned; the number of rows may be any.
        divisible = [n for n in signature if n.endswith("_ptr") or (aligned and n != "M")]
        yield Shipped(
            name=f"gelu_mlp_{direction} {dtype} {approximate} {size}",
            kernel=kernel,
            signature=signature,
            constexprs=constexprs | dict.fromkeys(flags, True),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            divisible_by_16=tuple(divisible),
            architectures=architectures,
        )
