"""`attention_decode`: attention of new tokens to a cache. Schema, fake, choice, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.autocast import autocast_dtype, without_autocast
from gptkernels.core.checks import check_count, check_same_device, check_shape, dtype_name
from gptkernels.core.choice import choose
from gptkernels.ops.attention import options
from gptkernels.ops.attention.splits import NUM_SPLITS_LIMIT
from gptkernels.ops.attention.torch import decode as aten

_LIBRARY = torch.library.Library("gptkernels", "FRAGMENT")
_LIBRARY.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, "
    "Tensor? block_table, Tensor? alibi_slopes, float softmax_scale, int left, float softcap, "
    "int num_splits, str impl) -> (Tensor out, Tensor lse)"
)


@torch.library.impl(_LIBRARY, "attention_decode", "CompositeExplicitAutograd")
def _attention_decode(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, impl = arguments
    with torch.no_grad(), without_autocast(q):
        match impl:
            case "cuda":
                from gptkernels.ops.attention.cuda import decode as cuda_kernels

                return cuda_kernels.attention_decode(q, *given)
            case "triton":
                from gptkernels.ops.attention.triton import decode as kernels

                return kernels.attention_decode(q, *given)
            case "torch":
                return aten.attention_decode(q, *given)
    raise ValueError(f"impl must be 'cuda', 'triton' or 'torch' here, got {impl!r}")


@torch.library.register_fake("gptkernels::attention_decode", lib=_LIBRARY)
def _attention_decode_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


_decode = torch.ops.gptkernels.attention_decode.default


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
    options.check_numbers(softmax_scale, softcap)
    if num_splits is not None:
        check_count("num_splits", num_splits)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise RuntimeError("attention_decode has no backward pass: call it under torch.no_grad()")
    left, _ = options.bounds(True, window)
    slopes = options.slopes(alibi_slopes, q, q.shape[2])
    dtype = autocast_dtype(q)
    q, k_cache, v_cache = q.to(dtype), k_cache.to(dtype), v_cache.to(dtype)
    out, lse = _decode(
        q, k_cache, v_cache, cache_lengths, block_table, slopes,
        options.scale(softmax_scale, q), left, float(softcap),
        min(num_splits or 0, NUM_SPLITS_LIMIT), choose(impl, q),
    )  # fmt: skip
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
    options.check_tensors(names, (q, k_cache, v_cache), kinds)
    (B, _, H, D), (entries, size, Hk) = q.shape, k_cache.shape[:3]
    check_shape("k_cache", k_cache, (entries, size, Hk, D), "head width of q")
    check_shape("v_cache", v_cache, (entries, size, Hk, D), "that of k_cache")
    options.check_heads(H, Hk)
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
