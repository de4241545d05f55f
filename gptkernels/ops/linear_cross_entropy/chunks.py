"""The loop over chunks of rows that impl="torch" and impl="cpu" share: the products of a chunk, and
the room for its logits.

A chunk takes rows x V numbers in x's dtype: at least 8 MiB, at least 256 rows, and beyond that no
more than the fp32 sum of the weight's gradient takes, 4 V C bytes, or 512 MiB. With fewer rows the
reading and writing of this sum would take long: 8 bytes for 2 flops a row. A single chunk has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core import products

_LEAST_BYTES, _MOST_BYTES = 8 << 20, 512 << 20
_LEAST_ROWS = 256
# Products of so many rows are the fastest where their depth is a vocabulary (oneDNN, on a CPU).
_ROWS_OF_DX = 256
# The gradients of so many classes, when they are added to the sum, are still in a CPU's cache.
_CLASSES_TOGETHER = 8192
# 16-bit numbers in a row of an AMX tile: `core.products`.
_DEPTH = 32


def rows_together(rows: int, width: int, classes: int, itemsize: int) -> int:
    """How many rows a chunk has: all chunks about the same."""
    of_class = min(4 * width, _MOST_BYTES // classes)  # bytes
    most = max(of_class, _LEAST_ROWS * itemsize, _LEAST_BYTES // classes) // itemsize
    chunks = -(-rows // most)
    each = -(-rows // max(1, chunks))
    return -(-each // _DEPTH) * _DEPTH


# (sum, part, out, first): sum = part if it is the first, else sum += part; with `out` the sum goes
# there instead. The sum is fp32, the others are in x's dtype.
Add = Callable[[Tensor, Tensor, Tensor | None, bool], None]


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_mask: Sequence[bool],
    of_rows: Callable[[Tensor, slice], None],
    add: Add,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls of_rows(logits, rows) for each chunk, where logits (R, V) are those of x's `rows`; a
    gradient is wanted where `grad_mask` is True: then it has put the logits' gradients in their
    place. `add` adds up the weight's gradient. Returns dx, dweight and dbias, each empty where no
    gradient is wanted."""
    (N, C), V = x.shape, weight.shape[0]
    need_x, need_weight, need_bias = grad_mask
    dx = x.new_empty(x.shape if need_x else 0)
    dbias = x.new_zeros(V, dtype=torch.float32) if need_bias else x.new_empty(0)
    each = rows_together(N, C, V, x.element_size())
    of_weight = _WeightGradient(x, weight, -(-N // max(1, each)), add) if need_weight else None
    # Rows of a multiple of 32 numbers, as many as that: past the logits there are zeros.
    room = x.new_empty(min(each, -(-N // _DEPTH) * _DEPTH), -(-V // _DEPTH) * _DEPTH)
    room[:, V:] = 0
    padding = (0, products.missing_columns(x))
    wide, wide_weight = (F.pad(t, padding) if padding[1] else t for t in (x, weight))
    for first in range(0, N, max(1, each)):
        rows = slice(first, min(first + each, N))
        count = rows.stop - rows.start
        logits = room[:count, :V]
        if bias is None:
            torch.mm(wide[rows], wide_weight.t(), out=logits)
        else:
            torch.addmm(bias, wide[rows], wide_weight.t(), out=logits)
        of_rows(logits, rows)
        if need_x:
            _product(logits, weight, dx[rows])
        if of_weight is not None:
            more = -count % _DEPTH
            room[count : count + more] = 0
            some = F.pad(x[rows], (0, 0, 0, more)) if more else x[rows]
            of_weight.add(room[: count + more, :V], some)
        if need_bias:
            dbias += logits.sum(0, dtype=torch.float32)
    dweight = x.new_empty(0) if of_weight is None else of_weight.found
    return dx, dweight, dbias.to(x.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes a b to `out`."""
    step = _ROWS_OF_DX if a.is_cpu else max(1, len(a))
    for first in range(0, len(a), step):
        torch.mm(a[first : first + step], b, out=out[first : first + step])


class _WeightGradient:
    """The gradient `found` (V, C), in x's dtype, is right after the last of `chunks` additions."""

    def __init__(self, x: Tensor, weight: Tensor, chunks: int, add: Add) -> None:
        self.found = x.new_empty(weight.shape) if chunks else x.new_zeros(weight.shape)
        self._chunks, self._added, self._add = chunks, 0, add
        self._sum = self.found  # in fp32
        if chunks > 1 and x.dtype != torch.float32:
            self._sum = x.new_empty(weight.shape, dtype=torch.float32)

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """Adds dlogits^T x, of dlogits (R, V) and x (R, C)."""
        self._added += 1
        if self._sum is self.found and self._added == 1:
            torch.mm(dlogits.t(), x, out=self.found)
        elif self._sum is self.found:
            self._sum.addmm_(dlogits.t(), x)
        else:
            # Some classes at a time: while they are in the cache.
            last = self._added == self._chunks
            for start in range(0, len(self._sum), _CLASSES_TOGETHER):
                some = slice(start, start + _CLASSES_TOGETHER)
                product = torch.mm(dlogits[:, some].t(), x)
                out = self.found[some] if last else None
                self._add(self._sum[some], product, out, self._added == 1)
