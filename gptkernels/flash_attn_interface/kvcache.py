"""flash_attn_with_kvcache: new tokens are written into their caches, then read with the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import check_integer
from gptkernels.core.sharding import distributed
from gptkernels.flash_attn_interface import arguments, cache
from gptkernels.flash_attn_interface.arguments import Window
from gptkernels.ops.attention.decode import attention_decode


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of new tokens to a cache, as `flash_attn.flash_attn_with_kvcache`, by
    `gptkernels.attention_decode`. With k and v, these are first written into the caches, in place.

    Args:
        q: Queries (B, Tq, H, D), float32, bfloat16 or float16.
        k_cache, v_cache: Keys and values (B, Tmax, Hk, D) in q's dtype, with a last stride of 1, or
            more rows than B; with a block_table pages (N, page, Hk, D), of any size.
        k, v: Keys and values (B, Tnew, Hk, D) of the new tokens, or None. They go to the places
            cache_seqlens[b], cache_seqlens[b] + 1 ... of entry b's cache.
        rotary_cos, rotary_sin: Refused: rotate q and k before the call.
        cache_seqlens: An int or (B,) int32: how many keys each cache holds before the call, those
            of cache_leftpad included. None, which k does not allow, means all Tmax. The values are
            checked on a CPU; on a GPU a place past the cache is PyTorch's device-side assert.
        cache_batch_idx: (B,) int32, the rows of the caches that q's entries belong to; not with a
            block_table.
        cache_leftpad: (B,) int32, how many keys at the beginning of a cache do not count; not with
            a block_table. Positions count from there.
        block_table: (B, pages) int32, the numbers of an entry's pages, in order.
        softmax_scale: Factor of the scores; None means 1 / sqrt(D).
        causal: Whether a query sees only the keys up to its own position, the last query and the
            last key being at one position; else it sees all.
        window_size, softcap, alibi_slopes: As for `flash_attn_func`.
        rotary_interleaved: Says how rotary_cos is applied, so without it there is nothing to say.
        num_splits: The most splits of an entry's keys; 0 means that its length decides.
        return_softmax_lse: Whether to return softmax_lse as well.

    Returns:
        out (B, Tq, H, D) in q's dtype; with return_softmax_lse, (out, softmax_lse), where
        softmax_lse is (B, H, Tq) float32, +inf where a query sees no key.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
            The caches are as they were then.
        RuntimeError: An input requires a gradient, for which there is no backward pass.
        NotImplementedError: rotary_cos or rotary_sin is given, or a block_table with
            cache_batch_idx or cache_leftpad, or DTensors.
    """
    for name, value in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if value is not None:
            raise NotImplementedError(f"{name} is not supported: rotate q and k before the call")
    if distributed(q, k_cache, v_cache, k, v):
        raise NotImplementedError(
            "flash_attn_with_kvcache takes no DTensors: give it each rank's own part, .to_local() "
            "of each, whose cache it writes"
        )
    check_integer("num_splits", num_splits)
    if num_splits < 0:
        raise ValueError(f"num_splits must be 0 or more, got {num_splits}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name} must be a tensor with four dimensions, got {shape}")
    if requires_grad((q, k_cache, v_cache, k, v, alibi_slopes)):
        raise RuntimeError(
            "flash_attn_with_kvcache has no backward pass: call it under torch.no_grad()"
        )
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    places = cache.places(len(q), k_cache, cache_batch_idx, cache_leftpad, block_table)
    if places.own_rows and len(k_cache) > len(q):  # entry b's row is row b of a larger cache
        k_cache, v_cache = k_cache[: len(q)], v_cache[: len(q)]
    new = cache.check_new(k, v, k_cache, v_cache, len(q))
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must say where k and v are written, got None")
    held = cache.held(cache_seqlens, len(q), k_cache, places, new)
    lengths = held + new if places.begins is None else held + new - places.begins

    def attend(q: Tensor) -> Any:
        keys, values, table = places.read(k_cache, v_cache)
        return attention_decode(
            q, keys, values, lengths, block_table=table, num_splits=num_splits or None,
            return_lse=return_softmax_lse, **options,
        )  # fmt: skip

    q = arguments.unit_stride(q)
    if k is not None and v is not None:
        attend(q[:, :0])  # checks every argument: nothing is written where one is wrong
        places.write(k_cache, k, held)
        places.write(v_cache, v, held)
    if not return_softmax_lse:
        return attend(q)
    out, lse = attend(q)
    return out, arguments.logsumexp(lse)
