"""Launchers of linear_cross_entropy's CUDA C++ kernels: the products of csrc/linear_cross_entropy,
whose logits stay in a tile, and for the gradients those of the GELU MLP.

The backward pass computes the logits again, a block of classes at a time, and holds the gradients
of one block's logits, in x's dtype. They take about the bytes of the weight's gradient in fp32, at
least 32 and at most 256 MiB; with very many rows those of 768 classes.

`build` is an index into the compiled module's linear_cross_entropy_builds(), the builds for Hopper;
every product of the call uses it. With -1 the rules of csrc/linear_cross_entropy/choice.cpp and
csrc/gelu_mlp/choice.cpp choose for each product. RuntimeError is raised where the given build
cannot compute one of the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import cuda_products as products
from gptkernels.core import native
from gptkernels.ops.linear_cross_entropy import torch as plain
from gptkernels.ops.linear_cross_entropy.options import LossOptions

# Of the gradients of a block's logits.
_LEAST_BYTES, _MOST_BYTES = 32 << 20, 256 << 20
# A block has a multiple of this many classes, which the columns of every kernel's tiles divide.
_CLASSES = 768


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    grad_mask: Sequence[bool],
    *,
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the losses and lse (N,), fp32, and with dloss also dx, dweight and dbias, each empty
    where no gradient is wanted. All floating tensors but dloss have one dtype."""
    if not x.numel():  # there is nothing to fuse
        return plain.linear_cross_entropy_fwd(x, weight, bias, targets, dloss, options, grad_mask)
    rows, classes = x.shape[0], weight.shape[0]
    targets = targets.contiguous()
    of_logits = _of_logits(x, weight, options)
    inputs = dict(x=x, weight=weight, bias=bias, targets=targets)
    names = ("highest", "exponential", "sum", "at_target")
    tiles = native.call(
        "linear_cross_entropy_tiles", x, inputs=inputs, outputs=dict.fromkeys(names),
        **of_logits, build=build,
    )  # fmt: skip
    highest, exponential, total = (
        torch.empty((tiles, rows), dtype=torch.float32, device=x.device) if wanted else None
        for wanted in (True, True, options.label_smoothing > 0)
    )
    losses, lse, at_target = (
        torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3)
    )
    native.call(
        "linear_cross_entropy_partials", x, inputs=inputs,
        outputs=dict(highest=highest, exponential=exponential, sum=total, at_target=at_target),
        **of_logits, build=build,
    )  # fmt: skip
    native.call(
        "linear_cross_entropy_losses", x,
        inputs=dict(
            targets=targets, highest=highest, exponential=exponential, sum=total,
            at_target=at_target,
        ),
        outputs=dict(losses=losses, lse=lse),
        rows=rows, classes=classes, tiles=tiles, **_of_loss(options),
    )  # fmt: skip
    if dloss is None:
        return losses, lse, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    gradients = linear_cross_entropy_bwd(
        dloss, x, weight, bias, targets, lse, options, grad_mask, build=build
    )
    return losses, lse, *gradients


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
    build: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias, each empty where `grad_mask` is False."""
    if not x.numel():
        return plain.linear_cross_entropy_bwd(
            dloss, x, weight, bias, targets, lse, options, grad_mask
        )
    need_x, need_weight, need_bias = grad_mask
    (rows, width), classes = x.shape, weight.shape[0]
    # Three distinct tensors: the outputs of an op must not be one tensor, even if it is empty.
    dx, dweight, dbias = (
        torch.empty(shape if wanted else 0, dtype=x.dtype, device=x.device)
        for shape, wanted in ((0, need_x), (weight.shape, need_weight), (classes, need_bias))
    )
    if not any(grad_mask):
        return dx, dweight, dbias
    inputs = dict(targets=targets.contiguous(), lse=lse.contiguous(), dloss=dloss.contiguous())
    each = classes_together(rows, width, classes, x.element_size())
    # TMA needs rows of a multiple of 16 bytes.
    room = torch.empty((rows, -(-each // 8) * 8), dtype=x.dtype, device=x.device)
    of_x = _InputGradient(x, -(-classes // each), build) if need_x else None
    for first in range(0, classes, each):
        block = slice(first, min(first + each, classes))
        dlogits = room[:, : block.stop - first]
        native.call(
            "linear_cross_entropy_dlogits", x,
            inputs=dict(
                x=x, weight=weight[block], bias=None if bias is None else bias[block], **inputs
            ),
            outputs=dict(dlogits=dlogits),
            **_of_logits(x, weight[block], options),
            dlogits_stride=room.stride(0), first=first, all=classes, **_of_loss(options),
            build=build,
        )  # fmt: skip
        if need_weight:
            products.weight_grad(dlogits, x, out=dweight[block], build=build)
        if need_bias:
            products.column_sums(dlogits, out=dbias[block])
        if of_x is not None:
            of_x.add(dlogits, weight[block])
    return dx if of_x is None else of_x.found, dweight, dbias


def classes_together(rows: int, width: int, classes: int, itemsize: int) -> int:
    """How many classes a block has: all blocks about the same, and whole tiles."""
    taken = min(max(_LEAST_BYTES, 4 * classes * width), _MOST_BYTES)
    most = max(_CLASSES, taken // (rows * itemsize))
    blocks = -(-classes // most)
    each = -(-classes // blocks)
    return min(classes, -(-each // _CLASSES) * _CLASSES)


class _InputGradient:
    """The gradient `found` (N, C), in x's dtype, is right after the last of `blocks` additions: a
    sum in fp32, in the order of the blocks."""

    def __init__(self, x: Tensor, blocks: int, build: int) -> None:
        self._left, self._build = blocks, build
        self._sum: Tensor | None = None
        # The kernels do not write to what they read, so the sum changes places.
        self._rooms = [
            torch.empty(x.shape, dtype=torch.float32, device=x.device)
            for _ in range(0 if blocks == 1 else 2)
        ]
        if not self._rooms or x.dtype != torch.float32:
            self.found = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def add(self, dlogits: Tensor, weight: Tensor) -> None:
        """Adds dlogits weight, of dlogits (N, V) and weight (V, C)."""
        self._left -= 1
        if not self._rooms:
            products.linear_bwd(dlogits, weight, out=self.found, build=self._build)
            return
        total = self._rooms[self._left % 2]
        products.linear_bwd(dlogits, weight, addend=self._sum, total=total, build=self._build)
        self._sum = total
        if self._left:
            return
        if dlogits.dtype == torch.float32:
            self.found = total
        else:
            products.partial_sums(total.view(1, -1), out=self.found.view(-1))


def _of_logits(x: Tensor, weight: Tensor, options: LossOptions) -> Mapping[str, Any]:
    """The numbers of a product of x and the transpose of weight."""
    return dict(
        dtype=native.dtype_code(x.dtype),
        rows=x.shape[0],
        classes=weight.shape[0],
        width=x.shape[1],
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        softcap=float(options.softcap),
    )


def _of_loss(options: LossOptions) -> Mapping[str, Any]:
    return dict(
        ignore_index=options.ignore_index,
        label_smoothing=float(options.label_smoothing),
        z_loss=float(options.z_loss),
    )
