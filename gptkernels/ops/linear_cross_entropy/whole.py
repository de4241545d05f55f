"""linear_cross_entropy by functions that are no implementation of ours: they bring their own
autograd, and hold all logits. So they take no call that has many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.autocast import autocast_enabled
from gptkernels.core.tuned import PYTORCH
from gptkernels.ops.linear_cross_entropy.options import LossOptions, counted

MOST_LOGITS = 1 << 22  # 16 MiB in fp32


def pytorch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
) -> Tensor:
    """The losses (N,), their sum or their mean, by PyTorch's own operators."""
    ignored, smoothing, z_loss, softcap = options
    if not autocast_enabled(x):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not x.is_cpu:
        # A target that is no class, which on a CPU was refused, would end the process.
        _, wrong = counted(targets, weight.shape[0], options)
        targets = targets.masked_fill(wrong, ignored)
    logits = F.linear(x, weight, bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits, targets, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction
    )
    if z_loss:
        counts = targets != ignored
        squares = (torch.logsumexp(logits, 1) ** 2).masked_fill(~counts, 0)
        if reduction == "sum":
            squares = squares.sum()
        elif reduction == "mean":
            squares = squares.sum() / counts.sum()
        loss = loss + z_loss * squares
    if not x.is_cpu:
        wrong = wrong if reduction == "none" else wrong.any()
        loss = loss.masked_fill(wrong, float("nan"))
    return loss


WHOLE = {PYTORCH: pytorch}


def takes(facts: Mapping[str, Any]) -> list[str]:
    """Those that have all that a class of calls asks for."""
    same = facts["autocast"] or facts["x"] == facts["weights"]
    return [PYTORCH] if same and facts["few"] else []


def run(name: str, *given: Any) -> Tensor:
    """The loss of the call by the function of this name."""
    found: Tensor = WHOLE[name](*given)
    return found
