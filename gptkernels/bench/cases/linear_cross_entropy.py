"""Speed of `gptkernels.linear_cross_entropy` against eager PyTorch, whose logits are in memory in
the dtype of x, as `F.cross_entropy(F.linear(x, weight), targets)` leaves them.

N rows, width C and V classes make one product forward and two backward (dx, dweight), each of
2 N C V operations; logits that are computed again are not counted. Bytes, in tensors: forward x and
weight are read; both directions read them once more, and write dx and dweight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.case import BOTH, FORWARD, Case
from gptkernels.bench.cases.dtypes import both
from gptkernels.bench.cases.workload import Part, Workload, normal
from gptkernels.bench.peers import linear_cross_entropy as others
from gptkernels.truth import baseline, reference

_CHECKED = 32  # rows


@dataclass(frozen=True)
class Shape:
    """Rows, width and classes."""

    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows} rows C{self.width} V{self.classes}"


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's head; a vocabulary of characters, other rows, GPT-3's width, Llama 3's vocabulary."""
    if device_type == "cuda":
        few = [Shape(8192, 768, 50257), Shape(8192, 1600, 50257)]
        more = [Shape(n, 768, 50257) for n in (1, 1024, 65536)] + [Shape(8192, 4096, 128256)]
    else:
        few = [Shape(256, 256, 8192), Shape(1024, 768, 50257), Shape(1024, 384, 65)]
        more = [Shape(n, 768, 50257) for n in (1, 256, 4096)]
    if level == "quick":
        return few[:1]
    return few if level == "default" else few + more


dtypes = both


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """The losses of all rows, as an evaluation asks for them; and their mean with its gradients."""
    rows, width, classes = shape.rows, shape.width, shape.classes
    draw = normal(device, dtype)
    tensors = draw(rows, width), draw(classes, width, scale=width**-0.5)
    generator = torch.Generator(device).manual_seed(0)
    targets = torch.randint(classes, (rows,), generator=generator, device=device)
    moved, product = (rows + classes) * width * dtype.itemsize, 2 * rows * width * classes
    work = {FORWARD: (moved, product), BOTH: (3 * moved, 3 * product)}
    for direction, reduction in ((FORWARD, "none"), (BOTH, "mean")):
        yield from Workload(
            shape=str(shape),
            sizes={"rows": rows, "C": width, "V": classes},
            tensors=tensors,
            plain=functools.partial(others.in_dtype, targets=targets, reduction=reduction),
            ours=functools.partial(
                gptkernels.linear_cross_entropy, targets=targets, reduction=reduction
            ),
            work={direction: work[direction]},
            peers=functools.partial(_peers, device, targets, reduction),
            part=_part(tensors, targets, reduction),
        ).cases("linear_cross_entropy", impls)


def _peers(
    device: torch.device, targets: Tensor, reduction: str, backward: bool, _: bool
) -> others.Peers:
    return others.peers(device, targets, reduction=reduction, backward=backward)


def _part(tensors: Sequence[Tensor], targets: Tensor, reduction: str) -> Part:
    """The last rows. The gradient of the weight is a sum over all."""
    x, weight = tensors
    n = min(_CHECKED, x.shape[0])

    def last(y: Tensor) -> Tensor:
        return y[-n:]

    def of(function: others.Function, x: Tensor, weight: Tensor) -> Tensor:
        losses: Tensor = function(x, weight, last(targets), reduction="none")
        return losses if reduction == "none" else losses.sum() / len(targets)

    return Part(
        tensors=[last(x), weight],
        truth=functools.partial(of, reference.linear_cross_entropy),
        yardstick=functools.partial(of, baseline.linear_cross_entropy),
        of_output=last,
        of_gradient=[last, None],
        of_own=[last, None],
    )
