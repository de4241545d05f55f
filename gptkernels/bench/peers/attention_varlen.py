"""Peers of `gptkernels.attention_varlen`, for self-attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.bench.peers import Function, Peers, flash, xformers_attention
from gptkernels.bench.peers.packages import installed


def peers(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    backward: bool,
) -> Peers:
    """Makers of functions of q (total, H, D), k and v (total, Hk, D), which return out (total, H,
    D). Sequence b has the rows from cu_seqlens[b] on; `backward`: whether out is differentiated."""

    def flash_attention(name: str) -> Function:
        return flash.function(
            name,
            "flash_attn_varlen_func",
            device,
            dtype,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=causal,
        )

    def xformers() -> Function:
        grouped = heads != key_heads
        biases = xformers_attention.biases(device, grouped=grouped, backward=backward)
        kind = biases.BlockDiagonalCausalMask if causal else biases.BlockDiagonalMask
        bias = kind.from_seqlens(cu_seqlens.diff().tolist())
        attend = xformers_attention.function(bias)

        def attention(*tensors: Tensor) -> Any:  # it wants a batch of one
            return attend(*(x[None] for x in tensors))[0]

        return attention

    found: Peers = {
        "FlashAttention-2": functools.partial(flash_attention, "FlashAttention-2"),
        "FlashAttention-3": functools.partial(flash_attention, "FlashAttention-3"),
        "FlashAttention-4": functools.partial(flash_attention, "FlashAttention-4"),
        xformers_attention.NAME: xformers,
    }
    if device.type != "cpu":  # PyTorch has no causal kernel of nested tensors for CPUs
        found["SDPA nested"] = functools.partial(
            _nested, cu_seqlens, max_seqlen, heads // key_heads, causal
        )
    return installed(found)


def _nested(cu_seqlens: Tensor, max_seqlen: int, group: int, causal: bool) -> Function:
    """SDPA of jagged nested tensors, which take as many key heads as query heads."""
    offsets, shortest = cu_seqlens.long(), int(cu_seqlens.diff().min())

    def nested(x: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(
            x, offsets, min_seqlen=shortest, max_seqlen=max_seqlen
        )
        return jagged.transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(nested(q), nested(k), nested(v), is_causal=causal)
        return out.transpose(1, 2).values()

    return attention
