"""linear_cross_entropy in Triton: the launchers.

    l (N, V) = x W^T + b, or softcap tanh(l / softcap) of it: never in memory
    lse  = log sum_v exp(l[v])
    loss = lse - (1 - smoothing) l[target] - smoothing mean_v(l[v]) + z lse^2
    dl   = dloss (exp(l - lse) (1 + 2 z lse) - smoothing / V - (1 - smoothing) [v is the target])
           (1 - tanh^2, with a softcap)
    dx = dl W, dW = dl^T x, db = the column sums of dl

    x, dx (N, C), W = weight (V, C), b = bias (V,), targets (N,) int64, losses, dloss and lse (N,)

The forward pass has one product, which is our kernel's (fwd.py); it keeps a few numbers of each row
and tile of l, and a second kernel combines them.

The backward pass has three. Our kernel (bwd.py) computes l again, a block of classes at a time, and
writes dl of the block in x's dtype. PyTorch computes the plain products, which have nothing to
fuse: the block's rows of dW, and dl W, which is rounded to x's dtype and whose sum over the blocks,
in fp32, is dx. db comes from column sums of row tiles, in fp32. Nothing is added by atomics: the
bits are the same every time.

Bytes beyond the products' own operands: those of dl, written once and read twice; for each block
but the first 10 (fp32: 8) for each number of dx; and the few of the forward pass. Saved for the
backward pass: x, weight, bias, targets and, in fp32, lse. Sums are in fp32, and fp32 products run
in full precision. l is in fp32: it is not rounded to x's dtype, as F.linear rounds it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gptkernels.core.triton_support import Shipped, Tile, on_device
from gptkernels.ops.linear_cross_entropy import torch as plain
from gptkernels.ops.linear_cross_entropy.options import LossOptions
from gptkernels.ops.linear_cross_entropy.triton.bwd import backward_kernel
from gptkernels.ops.linear_cross_entropy.triton.fwd import combine_kernel, forward_kernel

# This many row tiles run together for each column tile of the weight, which then stays in L2.
_GROUP = 8

# Rows of a program of the kernel that combines, and the tiles of classes that it reads together. So
# few rows give all multiprocessors some work, and still make whole 128-byte lines.
_COMBINED_ROWS, _COMBINED_TILES = 32, 16

# dl of a block of classes may take as many bytes as the weight's gradient in fp32, which the other
# implementations hold, but no more than the latter of these. Small problems, of less than the
# former, are one block.
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 256 << 20
# Each block but the first moves up to 10 bytes for a number of dx, and computes 2 flops for it and
# each class. With fewer classes a GPU would wait for these bytes longer than it computes.
_LEAST_CLASSES = 1024

# With fewer large tiles than this, some of the 108 multiprocessors of an A100 would have no work.
_FEW_TILES = 108

# Bytes of shared memory of a thread block that are enough for every tile. This is the limit of an
# A100; H100 and B200 have more.
_AMPLE_SHARED = 163 * 1024


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
    # Full-precision fp32 uses no tensor cores and keeps operands in registers. A step takes so long
    # that the next one's loads are there; with a third stage the backward kernel spills on sm_90.
    if itemsize == 4:
        return _Tile(64, 64, 32, num_warps=4, num_stages=2)
    if triton.cdiv(rows, 128) * triton.cdiv(cols, 128) < _FEW_TILES:
        return _Tile(64, 64, 64, num_warps=4, num_stages=4)
    if shared >= _AMPLE_SHARED:
        return _Tile(128, 128, 64, num_warps=8, num_stages=4)
    return _Tile(128, 128, 32, num_warps=8, num_stages=4)


def _tile_for(x: Tensor, weight: Tensor) -> _Tile:
    """Returns the tile for x W^T on x's device."""
    (rows, width), strides = x.shape, (x.stride(0), weight.stride(0))
    # Triton uses vector loads only where it knows that 16 divides the integer arguments.
    aligned = all(size % 16 == 0 for size in (width, *strides))
    return _tile(rows, weight.shape[0], x.element_size(), aligned, _shared_bytes(x.device))


def tiles(x: Tensor, weight: Tensor) -> dict[str, list[Tile]]:
    """Returns the tiles for x W^T in either pass, by the launchers' keyword: first the chosen one,
    then the others for the same size of elements."""
    others = [
        _tile(rows, 1, x.element_size(), aligned, shared)
        for rows in (128 * _FEW_TILES, 1)
        for aligned in (True, False)
        for shared in (_AMPLE_SHARED, 0)
    ]
    return {"tile": list(dict.fromkeys([_tile_for(x, weight), *others]))}


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Returns the bytes of shared memory that one thread block may use. The interpreter, for CPU
    tensors, has no limit."""
    if device.type != "cuda":
        return _AMPLE_SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the attribute
    return properties.shared_memory_per_block_optin


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    grad_mask: Sequence[bool],
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the losses and lse (N,), fp32, and with dloss (N,) dx, dweight and dbias, each empty
    where `grad_mask` is False. x and weight have a last stride of 1. A `tile` runs in place of the
    one chosen for x W^T."""
    if not x.numel():  # there is nothing to fuse
        return plain.linear_cross_entropy_fwd(x, weight, bias, targets, dloss, options, grad_mask)
    losses, lse = losses_fwd(x, weight, bias, targets, options, tile=tile)
    if dloss is None:
        # Five distinct tensors: the outputs of an op must not be one tensor, even if it is empty.
        dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    else:
        dx, dweight, dbias = linear_cross_entropy_bwd(
            dloss, x, weight, bias, targets, lse, options, grad_mask, tile=tile
        )
    return losses, lse, dx, dweight, dbias


def losses_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the losses and lse (N,), fp32, of at least one row and column."""
    (rows, width), classes = x.shape, weight.shape[0]
    used = _Tile(*tile) if tile else _tile_for(x, weight)
    smoothing = options.label_smoothing > 0
    tiles = triton.cdiv(classes, used.cols)
    highest, sums, total = (
        torch.empty((tiles, rows) if wanted else (0,), dtype=torch.float32, device=x.device)
        for wanted in (True, True, smoothing)
    )
    at, losses, lse = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3))
    targets = targets.contiguous()
    with on_device(x):
        forward_kernel[(triton.cdiv(rows, used.rows) * tiles,)](
            x,
            weight,
            x if bias is None else bias,  # even an unused pointer needs some tensor
            targets,
            highest,
            sums,
            total,
            at,
            rows,
            classes,
            width,
            x.stride(0),
            weight.stride(0),
            float(options.softcap),
            HAS_BIAS=bias is not None,
            SOFTCAP=options.softcap > 0,
            SMOOTHING=smoothing,
            **_constexprs(used, width),
            num_warps=used.num_warps,
            num_stages=used.num_stages,
            enable_fp_fusion=True,
        )
        combine_kernel[(triton.cdiv(rows, _COMBINED_ROWS),)](
            highest,
            sums,
            total,
            at,
            targets,
            losses,
            lse,
            rows,
            classes,
            tiles,
            options.ignore_index,
            float(options.z_loss),
            options.label_smoothing / classes,
            1.0 - options.label_smoothing,
            SMOOTHING=smoothing,
            BR=_COMBINED_ROWS,
            BT=_COMBINED_TILES,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
    return losses, lse


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    options: LossOptions,
    grad_mask: Sequence[bool],
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias, each empty where `grad_mask` is False. x and weight have a
    last stride of 1. A `tile` runs in place of the one chosen for x W^T."""
    if not x.numel():
        return plain.linear_cross_entropy_bwd(
            dloss, x, weight, bias, targets, lse, options, grad_mask
        )
    need_x, need_weight, need_bias = grad_mask
    (rows, _), classes = x.shape, weight.shape[0]
    dx, dbias = x.new_empty(0), x.new_empty(0)
    dweight = x.new_empty(weight.shape if need_weight else 0)
    if not any(grad_mask):
        return dx, dweight, dbias
    used = _Tile(*tile) if tile else _tile_for(x, weight)
    together = _classes_together(x, classes, used.cols)
    # The same room for each block.
    room = torch.empty((rows, together), dtype=x.dtype, device=x.device)
    sum_x: Tensor | None = None
    sums_of_bias = []
    for first in range(0, classes, together):
        block = slice(first, min(first + together, classes))
        partial = dlogits(
            dloss, x, weight, bias, targets, lse, options, block, room, need_bias, tile=used
        )
        dl = room[:, : block.stop - first]
        if need_weight:
            torch.mm(dl.t(), x, out=dweight[block])
        if need_x:
            sum_x = _add_product(sum_x, dl, weight[block])
        if need_bias:
            sums_of_bias.append(partial.sum(0)[: block.stop - first])
    if sum_x is not None:
        dx = sum_x.to(x.dtype)
    if need_bias:
        dbias = torch.cat(sums_of_bias).to(x.dtype)
    return dx, dweight, dbias


def dlogits(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    options: LossOptions,
    block: slice,
    room: Tensor,
    sum_columns: bool,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Fills room (N, at least the block's classes, rounded up to a tile's) with the gradients over
    the logits of a block of classes. Returns partial column sums of them, (tiles, room's columns)
    in fp32, empty unless `sum_columns`."""
    (rows, width), count = x.shape, block.stop - block.start
    used = _Tile(*tile) if tile else _tile_for(x, weight)
    tiles = triton.cdiv(rows, used.rows)
    partial = torch.empty(
        (tiles, room.shape[1]) if sum_columns else (0,), dtype=torch.float32, device=x.device
    )
    with on_device(x):
        backward_kernel[(tiles * triton.cdiv(count, used.cols),)](
            x,
            weight[block],
            x if bias is None else bias[block],  # even an unused pointer needs some tensor
            targets.contiguous(),
            lse.contiguous(),
            dloss.contiguous(),
            room,
            partial,
            rows,
            count,
            width,
            weight.shape[0],
            block.start,
            x.stride(0),
            weight.stride(0),
            room.stride(0),
            options.ignore_index,
            float(options.softcap),
            float(options.z_loss),
            options.label_smoothing / weight.shape[0],
            1.0 - options.label_smoothing,
            HAS_BIAS=bias is not None,
            SOFTCAP=options.softcap > 0,
            SUM_COLUMNS=sum_columns,
            **_constexprs(used, width),
            num_warps=used.num_warps,
            num_stages=used.num_stages,
            enable_fp_fusion=True,
        )
    return partial


def _classes_together(x: Tensor, classes: int, cols: int) -> int:
    """How many classes a block has, a multiple of `cols`: all blocks about the same."""
    rows, width = x.shape
    taken = min(max(4 * classes * width, _LEAST_BYTES), _MOST_BYTES)
    most = taken // (rows * x.element_size())
    most = max(most, _LEAST_CLASSES) // cols * cols
    blocks = triton.cdiv(classes, most)
    return triton.cdiv(triton.cdiv(classes, blocks), cols) * cols


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Returns total + a b in fp32, or a b alone in a's dtype. `total` may be lost."""
    if total is None:
        return torch.mm(a, b)
    total = total.float()
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(torch.mm(a, b))


def _constexprs(tile: _Tile, width: int) -> dict[str, object]:
    return {
        "EVEN": width % tile.depth == 0,
        "BM": tile.rows,
        "BN": tile.cols,
        "BK": tile.depth,
        "GROUP": _GROUP,
    }


def shipped() -> Iterator[Shipped]:
    """Yields the configurations for the ahead-of-time compile: those for a GPT's shapes, and those
    for odd sizes, which have no vector loads."""
    yield _shipped_combine()
    for dtype, rows, aligned in (
        ("bf16", 64, False),
        ("bf16", 64, True),
        ("bf16", 8192, True),
        ("fp16", 8192, True),
        ("fp32", 8192, False),
        ("fp32", 8192, True),
    ):
        itemsize = 4 if dtype == "fp32" else 2
        cols = 128 if rows == 64 else 50257
        ample, tight = (_tile(rows, cols, itemsize, aligned, n) for n in (_AMPLE_SHARED, 0))
        if ample == tight:
            yield from _shipped(dtype, ample, aligned, (80, 86, 90, 100))
        else:
            yield from _shipped(dtype, ample, aligned, (80, 90, 100))
            yield from _shipped(dtype, tight, aligned, (86,))


def _shipped(
    dtype: str, tile: _Tile, aligned: bool, architectures: tuple[int, ...]
) -> Iterator[Shipped]:
    size = f"{tile.rows}x{tile.cols}x{tile.depth}" + ("" if aligned else " odd")
    constexprs = _constexprs(tile, tile.depth if aligned else 1)
    data, sums = f"*{dtype}", "*fp32"
    product = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr"), data) | {"targets_ptr": "*i64"}
    sizes = dict.fromkeys(("N", "V", "C", "stride_x", "stride_w"), "i32") | {"softcap": "fp32"}
    parts = dict.fromkeys(("highest_ptr", "sum_ptr", "total_ptr", "at_ptr"), sums)
    backward = product | {"lse_ptr": sums, "dloss_ptr": sums, "dl_ptr": data, "partial_ptr": sums}
    backward |= sizes | dict.fromkeys(("classes", "first", "stride_dl", "ignore_index"), "i32")
    backward |= dict.fromkeys(("z_loss", "share", "kept"), "fp32")
    divisible = ("C", "stride_x", "stride_w") if aligned else ()
    for direction, kernel, signature, flags in (
        ("fwd", forward_kernel, product | parts | sizes, ("HAS_BIAS", "SOFTCAP", "SMOOTHING")),
        ("bwd", backward_kernel, backward, ("HAS_BIAS", "SOFTCAP", "SUM_COLUMNS")),
    ):
        pointers = [name for name in signature if name.endswith("_ptr")]
        for everything in (False, True):
            yield Shipped(
                name=f"linear_cross_entropy_{direction} {dtype} {size}"
                + (" options" if everything else ""),
                kernel=kernel,
                signature=signature,
                constexprs=constexprs | dict.fromkeys(flags, everything),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                # Tensors that PyTorch allocates are aligned; so are the blocks' rows.
                divisible_by_16=(*pointers, *divisible, *(["stride_dl"] * (direction == "bwd"))),
                architectures=architectures,
            )


def _shipped_combine() -> Shipped:
    signature = dict.fromkeys(("highest_ptr", "sum_ptr", "total_ptr", "at_ptr"), "*fp32")
    signature |= {"targets_ptr": "*i64", "losses_ptr": "*fp32", "lse_ptr": "*fp32"}
    signature |= dict.fromkeys(("N", "V", "tiles", "ignore_index"), "i32")
    signature |= dict.fromkeys(("z_loss", "share", "kept"), "fp32")
    return Shipped(
        name="linear_cross_entropy_combine",
        kernel=combine_kernel,
        signature=signature,
        constexprs={"SMOOTHING": True, "BR": _COMBINED_ROWS, "BT": _COMBINED_TILES},
        num_warps=4,
        num_stages=3,
        divisible_by_16=tuple(name for name in signature if name.endswith("_ptr")),
    )
