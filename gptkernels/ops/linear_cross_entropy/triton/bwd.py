"""linear_cross_entropy's backward kernel: the gradients over the logits of a block of classes.

    l  (N, V) = x W^T + b, or softcap tanh of it (logits.py), computed again; V is the block's
    dl (N, V) = dloss (exp(l - lse) (1 + 2 z lse) - smoothing / classes
                       - (1 - smoothing) [v is the target]) (1 - tanh^2, with a softcap)

dl is in x's dtype, and exactly 0 in rows that do not count or whose target is no class. For the
bias the kernel also writes the column sums of dl in each row tile, in fp32. Bytes beyond the
product's operands: those of dl, once.
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


@triton.jit(do_not_specialize=("N", "V", "classes", "first", "ignore_index"))
def backward_kernel(
    x_ptr,  # (N, C), rows stride_x apart
    w_ptr,  # (V, C), rows stride_w apart: a block of the weight
    bias_ptr,  # (V,), of the block
    targets_ptr,  # (N,) int64
    lse_ptr,  # (N,) fp32
    dloss_ptr,  # (N,) fp32
    dl_ptr,  # (N, V rounded up to BN), rows stride_dl apart
    partial_ptr,  # (tiles of rows, stride_dl) fp32, written if SUM_COLUMNS
    N,
    V,
    C,
    classes,  # of all blocks
    first,  # class of the block
    stride_x,
    stride_w,
    stride_dl,
    ignore_index,
    softcap,
    z_loss,
    share,  # smoothing / classes
    kept,  # 1 - smoothing
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,  # C is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes dl and its column sums, one (BM, BN) tile in each program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(V, BN), GROUP)
    rows = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    row_in, col_in = rows < N, cols < V
    l, t = logits(
        x_ptr, w_ptr, bias_ptr, rows, cols, N, V, C, stride_x, stride_w, softcap,
        HAS_BIAS, SOFTCAP, EVEN, BM, BN, BK,
    )  # fmt: skip

    targets = tl.load(targets_ptr + rows, mask=row_in, other=-1)
    alive, _ = alive_and_wrong(targets, classes, ignore_index)
    lse = tl.load(lse_ptr + rows, mask=row_in, other=0.0)
    dloss = tl.load(dloss_ptr + rows, mask=row_in, other=0.0)
    # Without a z-loss an infinite lse must not make 0 * inf of it.
    factor = tl.where(z_loss == 0.0, 1.0, 1.0 + 2.0 * z_loss * lse)
    dl = tl.exp(l - lse[:, None]) * factor[:, None] - share
    # A target in another block has no column here.
    dl -= tl.where(is_target(targets, first + tile_n.to(tl.int64) * BN, BN), kept, 0.0)
    if SOFTCAP:
        dl *= 1.0 - t * t
    # dloss may be infinite or NaN where a row does not count.
    dl = tl.where((row_in & alive)[:, None] & col_in[None, :], dl * dloss[:, None], 0.0)
    # Columns from V on are stored too, as zeros: a mask of columns would break up the stores.
    place = rows[:, None] * stride_dl + cols[None, :]
    tl.store(dl_ptr + place, dl.to(dl_ptr.dtype.element_ty), mask=row_in[:, None])
    if SUM_COLUMNS:
        tl.store(partial_ptr + tile_m.to(tl.int64) * stride_dl + cols, tl.sum(dl, 0))
