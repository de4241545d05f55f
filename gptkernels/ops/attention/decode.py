"""`attention_decode`: attention of new tokens to a cache. The op and the public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.checks import check_count, check_same_device, check_shape, dtype_name
from gptkernels.core.choice import choose
from gptkernels.core.registry import register
from gptkernels.ops.attention.options import (
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
    scale,
)
from gptkernels.ops.attention.splits import NUM_SPLITS_LIMIT


@register("gptkernels.ops.attention")
def attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32; the key lengths are those of the caches."""
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the newest tokens of each batch entry to all of its tokens so far.

    Query i of entry b sees the keys j < cache_lengths[b] - Tq + i + 1, as `gptkernels.attention`
    would have it for that entry alone. What an entry gets does not depend on the others in the
    batch: the same bits alone and among many, at any place, whatever Tmax, contiguous or in pages.
    (For impl="torch" that holds on a CPU; on a GPU its products may round otherwise in another
    batch or cache.)

    The kernels cut an entry's n keys into parts that run side by side and are combined in their
    order. A part has 256 ceil(n / 16384) keys, so that there are at most 64; with num_splits
    ceil(n / num_splits), rounded up to a multiple of 64. Parts outside the window are left out.

    Args:
        q: (B, Tq, H, D), float32, bfloat16 or float16, D <= 256, any strides with a unit last one.
        k_cache: (B, Tmax, Hk, D), of q's dtype and device, H a multiple of Hk; or, with a
            block_table, pages (N, page, Hk, D) that batch entries share out among them.
        v_cache: likewise. Keys and values of the new tokens are in the caches already.
        cache_lengths: (B,) int32: how many keys the last query sees, those of this step included.
            Values are checked on a CPU; the kernels clamp them to 0 ... Tmax (or pages * page).
        block_table: (B, pages) int32: the numbers of an entry's pages, in order; those past its
            length are not read. Values are checked on a CPU; the kernels clamp them to 0 ... N - 1.
        softmax_scale: 1 / sqrt(D) if None.
        window: (left, right), as for `gptkernels.attention`; right makes no difference.
        softcap, alibi_slopes: as for `gptkernels.attention`; slopes given as floats are copied to
            the device at every call, which waits for it: a tensor there does not.
        num_splits: into how many parts at most the kernels cut an entry's keys; None: by its
            length. impl="torch" leaves them whole.
        return_lse: also return lse.
        impl: "auto", "cuda", "triton" or "torch".

    Returns:
        out (B, Tq, H, D) in q's dtype, or (out, lse), lse (B, H, Tq) fp32.

    Under autocast everything is computed in its dtype, caches of another one being copied whole:
    keep them in that dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError: a gradient would have to pass, and there is no backward pass; or an explicit
            `impl` cannot run on this machine.
    """
    _check(q, k_cache, v_cache, cache_lengths, block_table)
    if num_splits is not None:
        check_count("num_splits", num_splits)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise RuntimeError("attention_decode has no backward pass: call it under torch.no_grad()")
    impl = choose(impl, q)
    options = AttentionOptions(
        softmax_scale=scale(softmax_scale, q), softcap=softcap, key_lengths=cache_lengths
    )
    options = complete(options, q, causal=True, window=window, alibi_slopes=alibi_slopes)
    dtype = autocast_dtype(q)
    tensors = (q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), block_table)
    splits = min(num_splits or 0, NUM_SPLITS_LIMIT)
    out, lse = attention_decode_fwd(*tensors, splits, *options, impl)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
) -> None:
    cache = "(B, Tmax, Hk, D)" if block_table is None else "(N, page, Hk, D)"
    names, kinds = ("q", "k_cache", "v_cache"), ("(B, Tq, H, D)", cache, cache)
    check_tensors(names, (q, k_cache, v_cache), kinds)
    (B, _, H, D), (entries, size, Hk) = q.shape, k_cache.shape[:3]
    check_shape("k_cache", k_cache, (entries, size, Hk, D), "head width of q")
    check_shape("v_cache", v_cache, (entries, size, Hk, D), "that of k_cache")
    check_heads(H, Hk)
    _check_indices("cache_lengths", cache_lengths, q)
    check_shape("cache_lengths", cache_lengths, (B,), "one length per batch entry of q")
    most = size
    if block_table is None:
        check_shape("k_cache", k_cache, (B, size, Hk, D), "batch of q")
    else:
        _check_indices("block_table", block_table, q)
        if block_table.dim() != 2 or block_table.shape[0] != B:
            raise ValueError(
                f"block_table must have shape ({B}, pages), got {tuple(block_table.shape)}"
            )
        most = size * block_table.shape[1]
    # On a GPU reading the values would synchronise; under compile there are none yet.
    if q.device.type != "cpu" or torch.compiler.is_compiling() or B == 0:
        return
    least, longest = (int(x) for x in cache_lengths.aminmax())
    if least < 0 or longest > most:
        wrong = least if least < 0 else longest
        raise ValueError(f"cache_lengths must lie between 0 and {most}, got {wrong}")
    if block_table is not None:
        _check_pages(block_table, cache_lengths, size, entries)


def _check_indices(name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_name(tensor.dtype)}")
    check_same_device(name, tensor, "q", q)


def _check_pages(block_table: Tensor, cache_lengths: Tensor, size: int, entries: int) -> None:
    used = torch.arange(block_table.shape[1]) * size < cache_lengths[:, None]
    pages = block_table[used]
    if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= entries):
        wrong = int(pages.min()) if int(pages.min()) < 0 else int(pages.max())
        raise ValueError(f"block_table must name pages 0 ... {entries - 1}, got {wrong}")
