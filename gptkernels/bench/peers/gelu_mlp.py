"""Peers of `gptkernels.gelu_mlp`.

Liger has gated blocks alone, and TransformerEngine's LayerNormMLP starts with a norm that cannot be
left out: neither is this op.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptkernels.bench.peers import Function, Peers
from gptkernels.bench.peers.compiled import both
from gptkernels.truth import baseline


def peers(
    device: torch.device,
    dtype: torch.dtype,
    *,
    approximate: str = "tanh",
    backward: bool,
) -> Peers:
    """Makers of functions of x (..., C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,), which return y
    (..., C). `backward`: whether y is differentiated."""
    plain = functools.partial(baseline.gelu_mlp, approximate=approximate)

    def fused() -> Function:
        # cuBLAS has the tanh form as an epilogue; on a CPU it is F.gelu in place, with erf.
        form = "none" if device.type == "cpu" else "tanh"
        if approximate != form:
            raise NotImplementedError(
                f'torch._addmm_activation has GELU with approximate="{form}" alone on this device'
            )
        if backward:
            raise NotImplementedError("PyTorch has no derivative of torch._addmm_activation")
        return _fused

    return both(plain) | {"addmm with GELU": fused}


def _fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    a = torch._addmm_activation(b1, rows, w1.T, use_gelu=True)
    return torch.addmm(b2, a, w2.T).view(x.shape)
