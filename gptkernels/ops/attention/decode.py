"""`attention_decode`: attention of new tokens to a cache of keys and values. Holds the registered
op and the public function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import DTYPES, check_count, check_same_device, check_shape, dtype_name
from gptkernels.core.direct import direct
from gptkernels.core.keywords import refuse, without_unknown
from gptkernels.core.refusal import refuse_tangents
from gptkernels.core.registry import register
from gptkernels.core.sharding import Shards, by_shards, distributed
from gptkernels.core.values import readable
from gptkernels.ops.attention import elsewhere, flops, plan
from gptkernels.ops.attention.cpu import decode as cpu
from gptkernels.ops.attention.options import (
    MAX_HEAD_DIM,
    AttentionOptions,
    check_heads,
    check_tensors,
    complete,
    scale,
)
from gptkernels.ops.attention.splits import NUM_SPLITS_LIMIT

_ENTRIES = ("q", "k_cache", "v_cache", "key_lengths")


def _apart(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What has a batch of entries that know nothing of each other: pages belong to all of them."""
    slopes = given["alibi_slopes"]
    of_entries = slopes is not None and slopes.dim() == 2
    return () if given["block_table"] is not None else _ENTRIES + ("alibi_slopes",) * of_entries


# Not traceable: on a CPU the lengths are read, and elsewhere the loop depends on the sizes.
@register(
    "gptkernels.ops.attention",
    traceable=lambda *_: False,
    entries=_apart,
    flops=flops.decode,
)
def attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32. `options.key_lengths` holds the
    caches' lengths."""
    B, Tq, H, _ = q.shape
    out = q.new_empty((B, Tq, H, v_cache.shape[-1]))
    return out, q.new_empty((B, H, Tq), dtype=torch.float32)


_SHARDS = Shards.of(
    "q:BTHD k_cache:BSHD v_cache:BSHE cache_lengths:B alibi_slopes:BH sinks:H",
    "BTHE BHT",
    over="BH",
    evenly="H",
)
# Entries share the pages.
_PAGED_SHARDS = Shards.of(
    "q:BTHD k_cache:PSHD v_cache:PSHE cache_lengths:B block_table:BN alibi_slopes:BH sinks:H",
    "BTHE BHT",
    over="BH",
    evenly="H",
)


@without_unknown
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each batch entry's newest tokens to all of its tokens so far.

    Query i of entry b sees the keys j <= cache_lengths[b] - Tq + i, as if `gptkernels.attention`
    were called for that entry alone. An entry's result does not depend on the rest of the batch: it
    has the same bits alone or in any batch, for any Tmax, with contiguous caches or with pages.
    (For impl="torch" this holds on a CPU; on a GPU PyTorch's products may round differently in
    another batch or cache.)

    The kernels cut an entry's n keys into splits, which run in parallel and are combined in order.
    Without num_splits a split has 256 ceil(n / 16384) keys, so there are at most 64 splits. With
    num_splits it has ceil(n / num_splits) keys, rounded up to a multiple of 64. Splits outside the
    window are skipped.

    Args:
        q: Queries (B, Tq, H, D), float32, bfloat16 or float16. D is at most 512, and at most 256
            with impl="triton" and "cuda". The last stride must be 1; the other strides are free.
        k_cache: Keys (B, Tmax, Hk, D), with q's dtype and device and a last stride of 1; H must be
            a multiple of Hk. With a block_table: pages (N, page, Hk, D), shared by all entries.
        v_cache: Values, with the same requirements; their width Dv may differ from D, but not with
            impl="triton" and "cuda", which would have to copy the caches. The caches already hold
            the keys and values of the new tokens.
        cache_lengths: (B,) int32: how many keys the last query sees, including those of the new
            tokens. The values are checked on a CPU; the kernels clamp them to 0 ... Tmax (or to
            pages * page).
        block_table: (B, pages) int32: the numbers of an entry's pages, in order. Numbers past the
            entry's length are not read. The values are checked on a CPU; the kernels clamp them to
            0 ... N - 1.
        causal: Whether a query sees only the keys up to its own position. Without it every query
            sees the cache_lengths[b] keys.
        softmax_scale: Factor of the scores; None means 1 / sqrt(D).
        window: (left, right), as for `gptkernels.attention`; `causal` lowers right to 0.
        softcap, alibi_slopes, sinks: As for `gptkernels.attention`. Slopes given as floats are
            copied to the device at every call, and the call waits for that copy; a tensor on the
            device avoids the copy.
        num_splits: The most splits that the kernels make of an entry's keys. None means that the
            entry's length decides. impl="torch" makes no splits.
        return_lse: Whether to return lse as well.
        impl: "auto", "cuda", "triton", "cpu" or "torch". "auto" takes what `gptkernels tune`
            measured to be the fastest here; without that, on a CPU, "cpu" for up to 4 new tokens,
            else "torch".

    Returns:
        out (B, Tq, H, Dv) in q's dtype; with return_lse, (out, lse), where lse is (B, H, Tq)
        float32. Under autocast q and the caches are first converted to autocast's dtype. Keep the
        caches in that dtype: any other is converted, whole, at every call.

    Raises:
        TypeError, ValueError: An argument's type, dtype, shape, device, strides or value is wrong.
        RuntimeError: An input requires a gradient, for which there is no backward pass; or an
            explicit impl cannot run on this machine or these tensors.
        NotImplementedError: An input has a tangent of forward-mode AD, or an explicit impl lacks
            what the call asks for.
    """
    if unknown:
        refuse(attention_decode, unknown, elsewhere.DECODE)
    if type(q) is not Tensor and distributed(q):
        arguments = locals()
        shards = _SHARDS if block_table is None else _PAGED_SHARDS
        return by_shards(attention_decode, shards, arguments)
    signature = way = None
    if impl == "auto" and not torch.compiler.is_compiling():
        signature, way = plan.known(
            "attention_decode", q, k_cache, v_cache, causal, softmax_scale, window, softcap,
            alibi_slopes, 0.0, False, return_lse, cache_lengths, block_table, sinks,
        )  # fmt: skip
    if way is None and not _sound(q, k_cache, v_cache, cache_lengths, block_table):
        _check(q, k_cache, v_cache, cache_lengths, block_table)
    if readable(cache_lengths) and (block_table is None or readable(block_table)):
        _check_values(cache_lengths, block_table, k_cache)
    options = AttentionOptions(
        softmax_scale=scale(softmax_scale, q), softcap=softcap, key_lengths=cache_lengths
    )
    options = complete(
        options, q, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        batch=q.shape[0],
    )  # fmt: skip
    if num_splits is not None:
        check_count("num_splits", num_splits)
    inputs = (q, k_cache, v_cache, options.alibi_slopes, options.sinks)
    if requires_grad(inputs):
        raise RuntimeError("attention_decode has no backward pass: call it under torch.no_grad()")
    refuse_tangents(*inputs)
    if way is None:
        Tmax = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        way = plan.of(
            "attention_decode", signature, (q, k_cache, v_cache), (q.shape[1], Tmax, q.shape[0]),
            options, False, return_lse, impl, block_table is not None,
        )  # fmt: skip
    impl = way.forward
    dtype = autocast_dtype(q)
    if dtype != q.dtype:
        q, k_cache, v_cache = q.to(dtype), k_cache.to(dtype), v_cache.to(dtype)
    tensors = (q, k_cache, v_cache, block_table)
    splits = min(num_splits or 0, NUM_SPLITS_LIMIT)
    if impl == "cpu" and not return_lse and direct((*tensors, cache_lengths)):
        try:
            return cpu.without_lse(*tensors, splits, options)
        except Exception as error:
            impl = plans.instead(impl, error)
    out, lse = attention_decode_fwd(*tensors, splits, *options, impl)
    return (out, lse) if return_lse else out


def _sound(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
) -> bool:
    """Whether the tensors are those of most calls, which `_check` would pass: a call of it takes
    longer than a small cache."""
    if not (type(q) is type(k_cache) is type(v_cache) is type(cache_lengths) is Tensor):
        return False
    if block_table is not None:
        return False
    shape, cache, device, dtype = q.shape, k_cache.shape, q.device, q.dtype
    return (
        len(shape) == len(cache) == 4
        and v_cache.shape == cache
        and cache_lengths.shape == shape[:1] == cache[:1]
        and 0 < shape[3] == cache[3] <= MAX_HEAD_DIM
        and cache[2] > 0
        and shape[2] % cache[2] == 0
        and q.stride(3) == k_cache.stride(3) == v_cache.stride(3) == 1
        and dtype in DTYPES
        and k_cache.dtype == v_cache.dtype == dtype
        and cache_lengths.dtype == torch.int32
        and k_cache.device == v_cache.device == cache_lengths.device == device
    )


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
    width = v_cache.shape[3]
    check_shape("v_cache", v_cache, (entries, size, Hk, width), "that of k_cache but for the width")
    check_heads(H, Hk)
    _check_indices("cache_lengths", cache_lengths, q)
    check_shape("cache_lengths", cache_lengths, (B,), "one length per batch entry of q")
    if block_table is None:
        check_shape("k_cache", k_cache, (B, size, Hk, D), "batch of q")
        return
    _check_indices("block_table", block_table, q)
    if block_table.dim() != 2 or block_table.shape[0] != B:
        raise ValueError(
            f"block_table must have shape ({B}, pages), got {tuple(block_table.shape)}"
        )


def _check_values(cache_lengths: Tensor, block_table: Tensor | None, k_cache: Tensor) -> None:
    lengths = cache_lengths.tolist()
    if not lengths:
        return
    entries, size = k_cache.shape[:2]
    most = size if block_table is None else size * block_table.shape[1]
    least, longest = min(lengths), max(lengths)
    if least < 0 or longest > most:
        wrong = least if least < 0 else longest
        raise ValueError(f"cache_lengths must lie between 0 and {most}, got {wrong}")
    if block_table is not None:
        check_pages(block_table, cache_lengths, size, entries)


def _check_indices(name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_name(tensor.dtype)}")
    check_same_device(name, tensor, "q", q)


def check_pages(block_table: Tensor, cache_lengths: Tensor, size: int, entries: int) -> None:
    """Checks, on a CPU, that the pages of `size` keys that the lengths need are among `entries`.
    Raises ValueError."""
    used = torch.arange(block_table.shape[1]) * size < cache_lengths[:, None]
    pages = block_table[used]
    if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= entries):
        wrong = int(pages.min()) if int(pages.min()) < 0 else int(pages.max())
        raise ValueError(f"block_table must name pages 0 ... {entries - 1}, got {wrong}")
