"""Speed of `gptkernels.layer_norm` against eager PyTorch.

LayerNorm is bound by memory, so the floor is the bytes that any implementation must move, over the
measured copy bandwidth. In tensors of x's size:

    forward                    read x; write y                                        2
    forward, residual          read x, residual; write s, y                           4
    + backward                 read dy, x; write dx                                   2 + 3
    + backward, residual       read dy, ds, s; write dx (the residual's gradient too) 4 + 4

Checked are the last rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench.case import BOTH, FORWARD, Case
from gptkernels.bench.cases.dtypes import both
from gptkernels.bench.cases.workload import Function, Part, Workload, normal, whole
from gptkernels.bench.peers import layer_norm as others
from gptkernels.truth import baseline, reference

_CHECKED = 128  # rows
_DROPOUT = 0.1


@dataclass(frozen=True)
class Shape:
    """Rows of one width, and what happens before the norm."""

    rows: int
    width: int
    residual: bool = True
    dropout: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows C{self.width} {self.series}"

    @property
    def series(self) -> str:
        """What the sizes do not say."""
        return ("+residual" if self.residual else "plain") + (", dropout" if self.dropout else "")


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's width at a training batch, with and without residual; other widths and rows."""
    if device_type == "cuda":
        sizes = [(8192, 768), (8192, 1600), (8192, 4096), (2048, 12288)]
        rows, widths = [1, 64, 1024, 65536], [2048, 8192, 16384, 65536]
    else:
        sizes = [(512, 768), (1, 768), (8, 768), (128, 768), (1024, 768), (512, 1600)]
        rows, widths = [8192, 65536], [4096, 12288, 65536]
    few = [Shape(*size, residual) for size in sizes for residual in (True, False)]
    if level == "quick":
        return few[:2]
    if level == "default":
        return few
    first = Shape(*sizes[0])
    return [
        *few,
        dataclasses.replace(first, dropout=True),
        *(dataclasses.replace(first, rows=n) for n in rows),
        *(dataclasses.replace(first, width=width) for width in widths),
    ]


dtypes = both


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """Forward, and both directions."""
    rows, width = shape.rows, shape.width
    draw = normal(device, dtype)
    tensors = [draw(rows, width), draw(width), draw(width)]
    if shape.residual:
        tensors.append(draw(rows, width))
    moved = rows * width * dtype.itemsize
    work = {FORWARD: (4 * moved, 0), BOTH: (8 * moved, 0)}
    if not shape.residual:
        work = {FORWARD: (2 * moved, 0), BOTH: (5 * moved, 0)}
    p = _DROPOUT if shape.dropout else 0.0
    plain = functools.partial(_plain_added, p) if shape.residual else _plain
    yield from Workload(
        shape=str(shape),
        sizes={"rows": rows, "C": width},
        series=shape.series,
        tensors=tensors,
        plain=plain,
        ours=_through(gptkernels.layer_norm, dropout_p=p),
        work=work,
        peers=lambda backward, repeated: others.peers(
            device,
            dtype,
            width,
            residual=shape.residual,
            dropout_p=p,
            backward=backward,
            repeated=repeated,
        ),
        # PyTorch draws other dropout masks than ours.
        part=None if shape.dropout else _part(tensors),
    ).cases("layer_norm", impls)


def _through(layer_norm: Function, **more: Any) -> Function:
    """The op on x, weight, bias and, where it is, the residual; then the sum is an output too."""

    def through(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor, **how: Any) -> Any:
        if not added:
            return layer_norm(x, weight, bias, **more, **how)
        return layer_norm(x, weight, bias, residual=added[0], prenorm=True, **more, **how)

    return through


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _plain_added(p: float, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
    s = (F.dropout(x, p) if p else x) + residual
    return F.layer_norm(s, weight.shape, weight, bias), s


def _part(tensors: Sequence[Tensor]) -> Part:
    """The last rows. Gradients of weight and bias are sums over all."""
    x, weight, bias, *residual = tensors
    n = min(_CHECKED, x.shape[0])

    def last(x: Tensor) -> Tensor:
        return x[-n:]

    of_weights = whole if n == x.shape[0] else None
    return Part(
        tensors=[last(x), weight, bias, *(last(r) for r in residual)],
        truth=_through(reference.layer_norm),
        yardstick=_through(baseline.layer_norm),
        of_output=last,
        of_gradient=[last, of_weights, of_weights, *(last for _ in residual)],
        of_own=[whole, of_weights, of_weights, *(whole for _ in residual)],
    )
