"""Speed of `gptkernels.gelu_mlp` against eager PyTorch.

The block is bound by its products: M rows, width C, inner width F make 2 products forward and 4
backward (da, dw2, dw1, dx), each of 2 M C F operations, and every epilogue would ideally be free.
Recomputation does one product more, which is not counted: it buys memory, not results. It stands
beside a plain block under torch.utils.checkpoint, which does two more. Bytes, for a
shape that memory limits, in tensors:

    forward                read x, w1, w2; write y
    + backward             write h; read dy, x, h, w1, w2; write dx, dw1, dw2
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gptkernels
from gptkernels.bench.case import BOTH, FORWARD, Case
from gptkernels.bench.cases.dtypes import both
from gptkernels.bench.cases.workload import Part, Workload, normal, whole
from gptkernels.bench.peers import gelu_mlp as others
from gptkernels.truth import baseline, reference

_CHECKED = 64  # rows


@dataclass(frozen=True)
class Shape:
    """Rows and width; the inner width is four times that."""

    rows: int
    width: int
    recompute: bool = False

    def __str__(self) -> str:
        recompute = " recompute" if self.recompute else ""
        return f"{self.rows} rows C{self.width} F{4 * self.width}{recompute}"


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's smallest, and the pre-activation computed again; other rows and widths."""
    if device_type == "cuda":
        few = [Shape(8192, 768), Shape(8192, 1600), Shape(8192, 4096)]
        more = [Shape(n, 768) for n in (1, 64, 1024, 65536)] + [Shape(8192, 12288)]
    else:
        few = [Shape(n, 768) for n in (512, 1, 8, 128, 1024)]
        more = [Shape(4096, 768), Shape(512, 1600), Shape(128, 4096)]
    if level == "quick":
        return few[:1]
    few.append(dataclasses.replace(few[0], recompute=True))
    return few if level == "default" else few + more


dtypes = both


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """Forward, and both directions; recomputation has a sense with the backward pass alone."""
    rows, width, inner = shape.rows, shape.width, 4 * shape.width
    draw = normal(device, dtype)
    tensors = (
        draw(rows, width),
        draw(inner, width, scale=width**-0.5),
        draw(inner),
        draw(width, inner, scale=inner**-0.5),
        draw(width),
    )
    weights, product = 2 * width * inner, 2 * rows * width * inner
    forward = weights + 2 * rows * width
    backward = 2 * rows * inner + 2 * weights + 3 * rows * width
    work = {
        FORWARD: (forward * dtype.itemsize, 2 * product),
        BOTH: ((forward + backward) * dtype.itemsize, 6 * product),
    }
    if shape.recompute:
        del work[FORWARD]
    yield from Workload(
        shape=str(shape),
        sizes={"rows": rows, "C": width, "F": inner},
        series="recompute" if shape.recompute else "plain",
        tensors=tensors,
        plain=_checkpointed if shape.recompute else baseline.gelu_mlp,
        ours=functools.partial(gptkernels.gelu_mlp, recompute=shape.recompute),
        work=work,
        peers=lambda backward, _: (
            {} if shape.recompute else others.peers(device, dtype, backward=backward)
        ),
        part=_part(tensors),
    ).cases("gelu_mlp", impls)


def _checkpointed(*tensors: Tensor) -> Any:
    return checkpoint(baseline.gelu_mlp, *tensors, use_reentrant=False)


def _part(tensors: Sequence[Tensor]) -> Part:
    """The last rows. Gradients of the weights are sums over all."""
    x, *weights = tensors
    n = min(_CHECKED, x.shape[0])

    def last(x: Tensor) -> Tensor:
        return x[-n:]

    of_weights = [whole if n == x.shape[0] else None] * len(weights)
    return Part(
        tensors=[last(x), *weights],
        truth=reference.gelu_mlp,
        yardstick=baseline.gelu_mlp,
        of_output=last,
        of_gradient=[last, *of_weights],
        of_own=[whole, *of_weights],
    )
