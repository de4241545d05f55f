"""What both passes of linear_cross_entropy compute on the device: a tile of the logits
l = x W^T + b, or softcap tanh(l / softcap) of them, and which targets count.

    x (N, C), W = weight (V, C), b = bias (V,), l (N, V) in fp32, targets (N,) int64

A tile of l is BM rows and BN classes. It reads (BM + BN) C numbers, many of them from L2, and
stays in registers: nothing is saved. fp32 products run in full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Returns (row tile, column tile) of a program. Programs go down GROUP row tiles, then on to
    the next column tile."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    place = program - first * tiles_n
    return first + place % height, place // height


@triton.jit
def _product(
    x_ptr,  # (N, C), rows stride_x apart
    w_ptr,  # (V, C), rows stride_w apart
    rows,
    cols,
    N,
    V,
    C,
    stride_x,
    stride_w,
    EVEN: tl.constexpr,  # C is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Returns x W^T at (rows, cols), both int64: 0 in rows from N on and in columns from V on."""
    depth = tl.arange(0, BK)
    row_in, col_in = rows < N, cols < V
    x_tile = x_ptr + rows[:, None] * stride_x + depth[None, :]
    w_tile = w_ptr + cols[None, :] * stride_w + depth[:, None]
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
    return acc


@triton.jit
def _tanh(x):
    # Logits may be near zero, where 2 sigmoid(2x) - 1 would lose digits by cancellation. So for
    # |x| < 1 this uses Lambert's continued fraction, with an error below 1e-9. For larger |x| the
    # subtraction from 1 loses little.
    x2 = x * x
    over = ((x2 + 378.0) * x2 + 17325.0) * x2 + 135135.0
    under = ((28.0 * x2 + 3150.0) * x2 + 62370.0) * x2 + 135135.0
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 1.0, x * (over / under), tl.where(x < 0.0, -far, far))


@triton.jit
def logits(
    x_ptr,
    w_ptr,
    bias_ptr,  # (V,)
    rows,
    cols,
    N,
    V,
    C,
    stride_x,
    stride_w,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Returns (l, t) at (rows, cols), both int64: t is the tanh, with a softcap. Columns from V on
    hold no logits."""
    l = _product(x_ptr, w_ptr, rows, cols, N, V, C, stride_x, stride_w, EVEN, BM, BN, BK)
    if HAS_BIAS:
        l += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    t = l
    if SOFTCAP:
        t = _tanh(l / softcap)
        l = softcap * t
    return l, t


@triton.jit
def alive_and_wrong(targets, V, ignore_index):
    """Which rows count and have a class for a target, and which count and have none."""
    counts = targets != ignore_index
    is_class = (targets >= 0) & (targets < V)
    return counts & is_class, counts & (is_class == 0)


@triton.jit
def is_target(targets, first, BN: tl.constexpr):
    """Where in a tile, whose classes begin at `first`, the column is the row's target."""
    column = targets - first
    # Narrow numbers: there is one comparison for each logit.
    column = tl.where((column >= 0) & (column < BN), column, -1).to(tl.int32)
    return tl.arange(0, BN)[None, :] == column[:, None]
