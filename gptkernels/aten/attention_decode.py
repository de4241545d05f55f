"""Attention of a few new tokens to a cache, one batch entry after the other.

Each entry is computed by itself, from its own length alone: so its bits do not depend on the
others in the batch. The lengths are read on the host, which on a GPU waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.aten import attention as one
from gptkernels.reference import cache_of


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32; see `reference.attention_decode`.

    num_splits: into how many parts the keys of an entry are cut, each softmaxed by itself, before
    their results are combined by their lse; 0 leaves them whole.
    """
    B, Tq, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    for b, length in enumerate(cache_lengths.tolist()):
        k, v = (cache_of(cache, b, length, block_table)[None] for cache in (k_cache, v_cache))
        size = max(1, -(-length // max(1, num_splits)))
        one_q = q[b, None]
        if size < length:  # or parts would be rounded before they are combined
            one_q, k, v = one_q.float(), k.float(), v.float()
        parts = [
            _part(one_q, k, v, first, min(first + size, length), alibi_slopes,
                  softmax_scale, left, right, softcap)
            for first in range(0, max(1, length), size)
        ]  # fmt: skip
        out[b], lse[b] = parts[0] if len(parts) == 1 else _combine(parts)
    return out, lse


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    last: int,
    alibi_slopes: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out and lse of the keys first ... last - 1 alone; positions are those among all keys."""
    length = k.shape[1]
    mask = None
    if last - first < length:
        mask = torch.zeros(1, length, dtype=torch.bool, device=q.device)
        mask[:, first:last] = True
    out, lse = one.attention_fwd(
        q, k, v, alibi_slopes, None, mask, None, scale, left, right, softcap, 0.0
    )
    return out[0], lse[0]


def _combine(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out = sum of exp(lse_s - lse) out_s, lse = log sum of exp(lse_s)."""
    outs = torch.stack([out for out, _ in parts])  # (splits, Tq, H, D)
    lses = torch.stack([lse for _, lse in parts])  # (splits, H, Tq)
    highest = lses.amax(0)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = (lses - highest).exp()
    total = weights.sum(0)
    lse = highest + total.log()
    weights = weights / total.masked_fill(total == 0, 1)
    return (outs * weights.mT[..., None]).sum(0), lse
