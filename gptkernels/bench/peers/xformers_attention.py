"""memory_efficient_attention of xformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.peers import Function
from gptkernels.bench.peers.packages import load, need_gpu

NAME = "xformers"


def biases(device: torch.device, *, grouped: bool, backward: bool) -> Any:
    """Its module of masks. Raises as a maker does."""
    module = load(NAME, "xformers.ops.fmha.attn_bias")
    need_gpu(device, NAME)
    if grouped and backward:
        raise NotImplementedError(f"{NAME} has no backward pass of grouped heads")
    return module


def function(bias: Any) -> Function:
    """A function of q (B, Tq, H, D), k and v (B, Tk, Hk, D)."""
    attend = load(NAME).memory_efficient_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        H, Hk = q.shape[2], k.shape[2]
        if Hk == H:
            return attend(q, k, v, attn_bias=bias)
        # It takes grouped heads as (B, T, Hk, H / Hk, D), with keys that only seem repeated.
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, H // Hk, -1) for x in (k, v))
        return attend(q.unflatten(2, (Hk, H // Hk)), k, v, attn_bias=bias).flatten(2, 3)

    return attention
