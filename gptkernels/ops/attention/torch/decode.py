"""Attention of a few new tokens to a cache, by PyTorch's own ops.

On a CPU one batch entry runs after the other, from its own length alone: so its bits do not depend
on the others in the batch. Elsewhere reading the lengths would wait for the device, and a block of
batch entries runs at once: its keys are gathered so that each entry's last key comes last, as
`attention` aligns them, with a mask where an entry has fewer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptkernels.ops.attention.torch import dense as one
from gptkernels.truth.reference import cache_of

# Elements of gathered keys, and of values, that are held at a time.
_GATHERED = 2**26


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    left: int,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32; see `reference.attention_decode`.

    num_splits is for kernels that cut keys into parts: here nothing does.
    """
    B, Tq, H, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, Tq), -math.inf, dtype=torch.float32, device=q.device)
    options = (softmax_scale, left, 0, softcap, 0.0)
    if q.device.type != "cpu":
        _at_once(q, k_cache, v_cache, cache_lengths, block_table, alibi_slopes, options, out, lse)
        return out, lse
    odd = any(_starts_anywhere(x) for x in (q, k_cache, v_cache))
    for b, length in enumerate(cache_lengths.tolist()):
        if length > 0:
            k, v = (cache_of(cache, b, length, block_table)[None] for cache in (k_cache, v_cache))
            new = q[b, None]
            if odd:  # PyTorch's products may round by where rows start
                new, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (new, k, v))
            result = one.attention_fwd(new, k, v, alibi_slopes, None, None, None, *options)
            out[b], lse[b] = result[0][0], result[1][0]
    return out, lse


def _starts_anywhere(x: Tensor) -> bool:
    """Whether a row may start at no multiple of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 > 0 or any(stride * size % 16 > 0 for stride in x.stride()[:-1])


def _at_once(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    options: tuple[float, int, int, float, float],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse without reading a value on the host; lengths and pages are clamped."""
    entries, page, Hk, D = k_cache.shape
    capacity = page if block_table is None else page * block_table.shape[1]
    if q.numel() == 0 or capacity == 0 or entries == 0:
        return
    left = options[1]
    columns = min(capacity, left + q.shape[1]) if left >= 0 else capacity
    step = max(1, _GATHERED // (columns * Hk * D))
    for b in range(0, len(q), step):
        few = slice(b, b + step)
        ends = cache_lengths[few, None].clamp(0, capacity)
        keys = torch.arange(-columns, 0, device=q.device) + ends
        alive, keys = keys >= 0, keys.clamp(min=0)
        if block_table is None:
            entry, place = torch.arange(entries, device=q.device)[few, None], keys
        else:
            entry = block_table[few].gather(1, keys // page).clamp(0, entries - 1)
            place = keys % page
        # 0 * NaN is NaN: what lies past a length must not reach a product.
        k, v = (
            torch.where(alive[..., None, None], cache[entry, place], 0)
            for cache in (k_cache, v_cache)
        )
        out[few], lse[few] = one.attention_fwd(
            q[few], k, v, alibi_slopes, None, alive[:, None, None], None, *options
        )
