"""linear_cross_entropy by PyTorch's products, a chunk of rows at a time (chunks.py), and one visit
of a CPU kernel to each row of logits (csrc/cpu/cross_entropy/params.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core.cpu import DTYPE_CODES, address, module
from gptkernels.ops.linear_cross_entropy import chunks
from gptkernels.ops.linear_cross_entropy.options import LossOptions


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    options: LossOptions,
    grad_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the losses and lse (N,), fp32, and dx, dweight and dbias, each empty where no
    gradient is wanted. All floating tensors but dloss have one dtype."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    lse = torch.empty_like(losses)
    targets = targets.contiguous()

    def of_rows(logits: Tensor, rows: slice) -> None:
        of_chunk = None if dloss is None else dloss[rows]
        _cross_entropy(logits, targets[rows], of_chunk, losses[rows], lse[rows], options)

    gradients = chunks.run(x, weight, bias, grad_mask, of_rows, _add)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias, each empty where `grad_mask` is False. A chunk has whole rows,
    of which lse is computed again, with more digits."""
    targets = targets.contiguous()

    def of_rows(logits: Tensor, rows: slice) -> None:
        _cross_entropy(logits, targets[rows], dloss[rows], None, None, options)

    return chunks.run(x, weight, bias, grad_mask, of_rows, _add)


def _add(total: Tensor, part: Tensor, out: Tensor | None, first: bool) -> None:
    module().accumulate(
        total.data_ptr(), part.data_ptr(), address(out), part.numel(), first,
        DTYPE_CODES[part.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    losses: Tensor | None,
    lse: Tensor | None,
    options: LossOptions,
) -> None:
    """Writes the losses and lse of some rows, unless they are None, and with dloss the logits'
    gradients over them. All but the logits are contiguous."""
    module().cross_entropy(
        logits.data_ptr(), targets.data_ptr(), address(dloss), address(losses), address(lse),
        *logits.shape, logits.stride(0), *options, DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
