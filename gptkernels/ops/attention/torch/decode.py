"""Attention of a few new tokens to a cache, computed with PyTorch's own ops.

On a CPU the batch entries run one after the other, so an entry's bits do not depend on the rest of
the batch. On other devices reading the lengths would wait for the device, so a block of batch
entries runs at once. The keys of that block are gathered so that each entry's last key comes last,
as `attention` aligns them; a mask hides the places that a shorter entry leaves empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.torch import dense as one

# The most elements of gathered keys, and of gathered values, in memory at a time.
_GATHERED = 2**26


def attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32; the formula is that of
    `gptkernels.truth.reference.attention_decode`.

    num_splits is ignored: nothing here cuts the keys into splits.
    """
    out, lse = without_keys(q, v_cache, options)
    assert options.key_lengths is not None
    if q.device.type != "cpu":
        _at_once(q, k_cache, v_cache, block_table, options, out, lse)
        return out, lse
    odd = any(_starts_anywhere(x) for x in (q, k_cache, v_cache))
    for b, length in enumerate(options.key_lengths.tolist()):
        if length > 0:
            k, v = (_keys_of(cache, b, length, block_table) for cache in (k_cache, v_cache))
            new = q[b, None]
            if odd:  # the alignment of rows may change how PyTorch's products round
                new, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (new, k, v))
            result = one.attention_fwd(
                new, k, v, options.entries(b, b + 1)._replace(key_lengths=None)
            )
            out[b], lse[b] = result[0][0], result[1][0]
    return out, lse


def _keys_of(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """Returns the first `length` keys, or values, of batch entry b: (1, length, Hk, D)."""
    if block_table is None:
        return cache[b, None, :length]
    pages = block_table[b, : -(-length // cache.shape[1])]
    return cache[pages].flatten(0, 1)[None, :length]


def _starts_anywhere(x: Tensor) -> bool:
    """Whether a row may start at an address that is not a multiple of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 > 0 or any(stride * size % 16 > 0 for stride in x.stride()[:-1])


def _at_once(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out and lse. The host reads no values, so lengths and page numbers are clamped instead
    of checked."""
    entries, page, Hk, D = k_cache.shape
    D = max(D, v_cache.shape[-1])
    capacity = page if block_table is None else page * block_table.shape[1]
    if q.numel() == 0 or capacity == 0 or entries == 0:
        return
    columns = capacity if options.left < 0 else min(capacity, options.left + q.shape[1])
    assert options.key_lengths is not None
    step = max(1, _GATHERED // (columns * Hk * D))
    for b in range(0, len(q), step):
        few = slice(b, b + step)
        ends = options.key_lengths[few, None].clamp(0, capacity)
        keys = torch.arange(-columns, 0, device=q.device) + ends
        alive, keys = keys >= 0, keys.clamp(min=0)
        if block_table is None:
            entry, place = torch.arange(entries, device=q.device)[few, None], keys
        else:
            entry = block_table[few].gather(1, keys // page).clamp(0, entries - 1)
            place = keys % page
        # Zeros replace what lies past a length, which may be NaN: a weight of 0 times NaN is NaN.
        k, v = (
            torch.where(alive[..., None, None], cache[entry, place], 0)
            for cache in (k_cache, v_cache)
        )
        mask = alive[:, None, None]
        out[few], lse[few] = one.attention_fwd(
            q[few],
            k,
            v,
            options.entries(b, b + step)._replace(key_lengths=None, attn_mask=mask),
        )
