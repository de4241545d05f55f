"""The caches of flash_attn_with_kvcache: how many keys they hold, where new ones are written, and
how `attention_decode` reads them.

Other rows of a cache, and keys that begin somewhere in a row, are pages: a row is a page of Tmax
keys, and a key a page of one. So a contiguous cache is not copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptkernels.core.checks import (
    check_is_tensor,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    dtype_name,
)
from gptkernels.flash_attn_interface.arguments import check_range


class Places(NamedTuple):
    """Where the keys of B batch entries are. The tensors are int32."""

    block_table: Tensor | None  # (B, pages)
    rows: Tensor | None  # (B,), the rows of the caches; None: row b is that of entry b
    begins: Tensor | None  # (B,), the first key of each; None: the first of the row

    @property
    def own_rows(self) -> bool:
        """Whether row b of the caches is that of entry b."""
        return self.block_table is None and self.rows is None

    def write(self, cache: Tensor, new: Tensor, held: Tensor) -> None:
        """Writes new (B, Tnew, Hk, D) into the cache, in place, behind the `held` (B,) keys."""
        place = held[:, None] + torch.arange(new.shape[1], device=held.device)
        if self.block_table is not None:
            page = self.block_table.gather(1, (place // cache.shape[1]).long())
            cache[page, place % cache.shape[1]] = new
            return
        rows = torch.arange(len(new), device=held.device) if self.rows is None else self.rows
        cache[rows[:, None], place] = new

    def read(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The caches and the block_table that `attention_decode` takes."""
        if self.block_table is not None:
            return k_cache, v_cache, self.block_table
        if self.begins is not None:
            Tmax, rows = k_cache.shape[1], self.rows
            if rows is None:
                rows = torch.arange(len(self.begins), dtype=torch.int32, device=k_cache.device)
            keys = torch.arange(Tmax, dtype=torch.int32, device=k_cache.device)
            table = (rows * Tmax + self.begins)[:, None] + keys
            return k_cache.flatten(0, 1)[:, None], v_cache.flatten(0, 1)[:, None], table
        return k_cache, v_cache, None if self.rows is None else self.rows[:, None]


def places(
    B: int,
    k_cache: Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> Places:
    """The places of B entries, checked as far as `attention_decode` does not. Raises TypeError,
    ValueError, NotImplementedError."""
    named = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    for name, given in named.items():
        if given is not None and block_table is not None:
            raise NotImplementedError(f"{name} is not supported together with block_table")
        if given is not None:
            _check_numbers(name, given, B, k_cache)
    if block_table is not None and not (isinstance(block_table, Tensor) and block_table.dim() == 2):
        got = tuple(block_table.shape) if isinstance(block_table, Tensor) else block_table
        raise TypeError(f"block_table must be a tensor (B, pages), got {got!r}")
    if cache_batch_idx is not None:
        check_range("cache_batch_idx", cache_batch_idx, len(k_cache) - 1)
    return Places(block_table, cache_batch_idx, cache_leftpad)


def held(
    cache_seqlens: int | Tensor | None, B: int, k_cache: Tensor, where: Places, new: int
) -> Tensor:
    """How many keys the caches hold before `new` ones are written, (B,) int32, those before the
    first that counts included. Raises TypeError, ValueError."""
    pages = 1 if where.block_table is None else where.block_table.shape[-1]
    capacity = k_cache.shape[1] * pages
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, Tensor):
        lengths = cache_seqlens
        _check_numbers("cache_seqlens", lengths, B, k_cache)
    elif isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        lengths = torch.full((B,), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    else:
        raise TypeError(f"cache_seqlens must be an int or an int32 tensor, got {cache_seqlens!r}")
    check_range("cache_seqlens", lengths, capacity - new, f" before {new} new tokens" * (new > 0))
    if where.begins is not None:
        check_range("cache_leftpad", where.begins, lengths + new, " that the cache holds")
    return lengths


def check_new(k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, B: int) -> int:
    """Checks new keys and values, both or none; returns how many tokens they are. Raises
    TypeError, ValueError."""
    if k is None and v is None:
        return 0
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is None:
            raise TypeError(f"k and v must be given together, got no {name}")
        check_tensor(name, new)
        check_same_dtype(name, new, f"{name}_cache", cache)
        check_same_device(name, new, f"{name}_cache", cache)
        tokens = k.shape[1] if isinstance(k, Tensor) and k.dim() > 1 else 0
        check_shape(name, new, (B, tokens, *cache.shape[2:]), f"that of {name}_cache's heads")
    return tokens


def _check_numbers(name: str, numbers: Tensor, B: int, k_cache: Tensor) -> None:
    check_is_tensor(name, numbers)
    if numbers.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_name(numbers.dtype)}")
    check_same_device(name, numbers, "k_cache", k_cache)
    check_shape(name, numbers, (B,), "one number for each batch entry of q")
