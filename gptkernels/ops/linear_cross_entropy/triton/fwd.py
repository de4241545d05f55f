"""linear_cross_entropy's forward kernels: losses and lse of logits that are never in memory.

    l (N, V) = x W^T + b, or softcap tanh of it (logits.py)
    lse  = log sum_v exp(l[v])
    loss = lse - (1 - smoothing) l[target] - smoothing mean_v(l[v]) + z lse^2, all (N,)

`forward_kernel` computes a tile of l and keeps three numbers of each of its rows: the maximum, sum
exp(l - maximum) and, with label smoothing, sum l; and l[target], where the tile has that column.
`combine_kernel` puts those of all tiles of a row together, in a fixed order.

Bytes beyond the product's operands: 8 N V / BN are written and 12 N V / BN read, 12 and 16 with
label smoothing. With tiles of 128 columns that is about a fortieth of what l would take in 16 bits,
written once and read twice. Saved for the backward pass: lse in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptkernels.ops.linear_cross_entropy.triton.logits import (
    alive_and_wrong,
    is_target,
    logits,
    tile_of,
)

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _finite(highest):
    """What is subtracted before exp: 0 in place of -inf, from which it would make NaN. A row with a
    logit of +inf has no lse: there NaN is right."""
    return tl.where(highest == -_INFINITY, 0.0, highest)


# Kernels specialised on N and V would be no faster: N differs from call to call, and no row of what
# is read is V long.
@triton.jit(do_not_specialize=("N", "V"))
def forward_kernel(
    x_ptr,  # (N, C), rows stride_x apart
    w_ptr,  # (V, C), rows stride_w apart
    bias_ptr,  # (V,)
    targets_ptr,  # (N,) int64
    highest_ptr,  # (tiles of classes, N) fp32
    sum_ptr,  # (tiles of classes, N) fp32
    total_ptr,  # (tiles of classes, N) fp32, written if SMOOTHING
    at_ptr,  # (N,) fp32
    N,
    V,
    C,
    stride_x,
    stride_w,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EVEN: tl.constexpr,  # C is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of one (BM, BN) tile of l in each program: the maximum of each row, sum exp(l - maximum),
    sum l, and l[target] where the tile has it."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(V, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    first = tile_n.to(tl.int64) * BN
    cols = first + tl.arange(0, BN)
    row_in, col_in = rows < N, cols < V
    l, _ = logits(
        x_ptr, w_ptr, bias_ptr, rows, cols, N, V, C, stride_x, stride_w, softcap,
        HAS_BIAS, SOFTCAP, EVEN, BM, BN, BK,
    )  # fmt: skip

    place = tile_n.to(tl.int64) * N + rows
    if SMOOTHING:
        total = tl.sum(tl.where(col_in[None, :], l, 0.0), 1)
        tl.store(total_ptr + place, total, mask=row_in)
    l = tl.where(col_in[None, :], l, -_INFINITY)
    # A NaN may be no maximum, but it is in the sum.
    highest = tl.max(l, 1)
    tl.store(highest_ptr + place, highest, mask=row_in)
    tl.store(sum_ptr + place, tl.sum(tl.exp(l - _finite(highest)[:, None]), 1), mask=row_in)

    targets = tl.load(targets_ptr + rows, mask=row_in, other=-1)
    # Past V too, or of a row that does not count: nobody reads that one.
    here = (targets >= first) & (targets < first + BN)
    at = tl.sum(tl.where(is_target(targets, first, BN), l, 0.0), 1)
    tl.store(at_ptr + rows, at, mask=row_in & here)


@triton.jit(do_not_specialize=("N", "V", "tiles", "ignore_index"))
def combine_kernel(
    highest_ptr,  # (tiles, N) fp32
    sum_ptr,  # (tiles, N) fp32
    total_ptr,  # (tiles, N) fp32, read if SMOOTHING
    at_ptr,  # (N,) fp32
    targets_ptr,  # (N,) int64
    losses_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    N,
    V,
    tiles,
    ignore_index,
    z_loss,
    share,  # smoothing / V
    kept,  # 1 - smoothing
    SMOOTHING: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Computes the losses and lse of BR rows in each program from what the tiles of classes gave,
    BT of them at a time."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    row_in = rows < N
    highest = tl.full((BR,), -_INFINITY, dtype=tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        inside = (tile < tiles)[:, None] & row_in[None, :]
        place = tile.to(tl.int64)[:, None] * N + rows[None, :]
        some = tl.load(highest_ptr + place, mask=inside, other=-_INFINITY)
        highest = tl.maximum(highest, tl.max(some, 0))

    base = _finite(highest)
    sums = tl.zeros((BR,), dtype=tl.float32)
    total = tl.zeros((BR,), dtype=tl.float32)
    for start in range(0, tiles, BT):
        tile = start + tl.arange(0, BT)
        inside = (tile < tiles)[:, None] & row_in[None, :]
        place = tile.to(tl.int64)[:, None] * N + rows[None, :]
        some = tl.load(highest_ptr + place, mask=inside, other=-_INFINITY)
        # A tile with nothing but -inf has the sum 0, or NaN: exp(0 - base) could be infinite.
        factor = tl.where(some == -_INFINITY, 0.0, tl.exp(_finite(some) - base[None, :]))
        sums += tl.sum(tl.load(sum_ptr + place, mask=inside, other=0.0) * factor, 0)
        if SMOOTHING:
            total += tl.sum(tl.load(total_ptr + place, mask=inside, other=0.0), 0)

    lse = base + tl.log(tl.where(row_in, sums, 1.0))
    targets = tl.load(targets_ptr + rows, mask=row_in, other=-1)
    alive, wrong = alive_and_wrong(targets, V, ignore_index)
    at = tl.load(at_ptr + rows, mask=row_in & alive, other=0.0)
    loss = lse - kept * at + z_loss * lse * lse
    if SMOOTHING:
        loss -= share * total
    loss = tl.where(alive, loss, tl.where(wrong, float("nan"), 0.0))
    tl.store(lse_ptr + rows, lse, mask=row_in)
    tl.store(losses_ptr + rows, loss, mask=row_in)
