"""Peers of `gptkernels.linear_cross_entropy`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.bench.peers import Function as Function
from gptkernels.bench.peers import Peers as Peers
from gptkernels.bench.peers.compiled import both
from gptkernels.bench.peers.packages import installed, load, need_gpu
from gptkernels.truth import baseline


def peers(device: torch.device, targets: Tensor, *, reduction: str, backward: bool) -> Peers:
    """Makers of functions of x (N, C) and weight (V, C), which return the losses of the targets
    (N,), or their mean. `backward`: whether that is differentiated."""
    given: dict[str, Any] = {"targets": targets, "reduction": reduction}

    def wide() -> Function:
        return functools.partial(baseline.linear_cross_entropy, **given)

    def liger() -> Function:
        module = load("Liger", "liger_kernel.ops.fused_linear_cross_entropy")
        need_gpu(device, "Liger")
        if backward and reduction == "none":
            raise NotImplementedError("Liger's gradients are those of a sum or a mean")
        apply = module.LigerFusedLinearCrossEntropyFunction.apply
        # bias, class weights, ignore_index, z-loss, label smoothing
        options = (None, None, -100, 0.0, 0.0, reduction)
        return lambda x, weight: apply(x, weight, targets, *options)[0]

    plain = functools.partial(in_dtype, **given)
    return installed(both(plain) | {"logits in fp32": wide, "Liger": liger})


def in_dtype(x: Tensor, weight: Tensor, *, targets: Tensor, reduction: str) -> Tensor:
    """PyTorch's own two, with logits in x's dtype."""
    return F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
