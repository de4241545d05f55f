"""Peers of `gptkernels.attention_decode`, which has no backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.peers import Function, Maker, Peers, Shape, flash, flex, sdpa
from gptkernels.bench.peers.packages import installed

_FLASH_2_PAGE = 256


def peers(
    device: torch.device,
    dtype: torch.dtype,
    q_shape: Shape,
    cache_shape: Shape,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
) -> Peers:
    """Makers of functions of q (B, Tq, H, D) and the caches of keys and values, which return out
    (B, Tq, H, D). The caches are (B, Tmax, Hk, D), or (pages, page, Hk, D) with a block_table."""
    (B, Tq, _, D), Hk, longest = q_shape, cache_shape[2], int(cache_lengths.max())

    def flash_attention(name: str, table: str) -> Function:
        options: dict[str, Any] = {"cache_seqlens": cache_lengths, "causal": True}
        if block_table is not None:
            options[table] = block_table
        made = flash.function(name, "flash_attn_with_kvcache", device, dtype, **options)
        paged = block_table is not None and name == "FlashAttention-2"
        if paged and cache_shape[1] % _FLASH_2_PAGE:
            raise NotImplementedError(f"{name} takes pages of a multiple of {_FLASH_2_PAGE} keys")
        return made

    def flex_attention() -> Function:
        if block_table is not None:
            raise NotImplementedError("FlexAttention takes no pages as they lie")

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= cache_lengths[b] - Tq + i

        return flex.function(device, q_shape, cache_shape, seen=seen, by_entry=True, backward=False)

    sees = functools.partial(_sees, Tq, longest, cache_lengths)
    of_keys = sdpa.peers(device, dtype, q_shape, (B, longest, Hk, D), sees, backward=False)
    found: Peers = {
        name: functools.partial(_of_caches, maker, longest, block_table)
        for name, maker in of_keys.items()
    }
    found |= {
        "FlexAttention": flex_attention,
        "FlashAttention-2": functools.partial(flash_attention, "FlashAttention-2", "block_table"),
        "FlashAttention-3": functools.partial(flash_attention, "FlashAttention-3", "page_table"),
    }
    return installed(found)


def _of_caches(maker: Maker, longest: int, block_table: Tensor | None) -> Function:
    """Of a function of keys and values, one of caches: pages are gathered within its time."""
    made = maker()

    def attention(q: Tensor, *caches: Tensor) -> Any:
        if block_table is not None:
            caches = tuple(x[block_table].flatten(1, 2) for x in caches)
        return made(q, *(x[:, :longest] for x in caches))

    return attention


def _sees(Tq: int, longest: int, cache_lengths: Tensor) -> tuple[Tensor | None, bool]:
    """A mask (B, 1, Tq, longest); none where every query sees all keys."""
    if Tq == 1 and bool((cache_lengths == longest).all()):
        return None, False
    device = cache_lengths.device
    positions = cache_lengths[:, None] - Tq + torch.arange(Tq, device=device)
    return (torch.arange(longest, device=device) <= positions[..., None])[:, None], False
