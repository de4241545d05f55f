"""Calls of decoding's CPU kernel. The formula is in csrc/cpu/attention/decode/params.h."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.cpu import DTYPE_CODES, address, module
from gptkernels.ops.attention.options import AttentionOptions, without_keys


def attention_decode_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k_cache: Tensor,  # (B, Tmax, Hk, D), or pages (N, page, Hk, D)
    v_cache: Tensor,  # likewise, (..., Dv)
    block_table: Tensor | None,  # (B, pages) int32
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, Dv) and lse (B, H, Tq) in fp32. num_splits is 0 where the user gave
    none."""
    B, Tq, H, _ = q.shape
    lse = torch.empty((B, H, Tq), dtype=torch.float32)
    return _forward(q, k_cache, v_cache, block_table, num_splits, options, lse), lse


def without_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
) -> Tensor:
    """Returns out as attention_decode_fwd does."""
    return _forward(q, k_cache, v_cache, block_table, num_splits, options, None)


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
    lse: Tensor | None,
) -> Tensor:
    (B, Tq, H, D), (entries, page, Hk, Dv) = q.shape, v_cache.shape
    if Dv == D and q.is_contiguous():  # much the faster one of the two
        out = torch.empty_like(q)
    else:
        out = torch.empty((B, Tq, H, Dv), dtype=q.dtype)
    if B == 0 or Tq == 0 or H == 0:
        return out
    lengths, slopes, sinks = options.key_lengths, options.alibi_slopes, options.sinks
    assert lengths is not None
    pages, table = 1, 0
    if block_table is not None:
        block_table = block_table.contiguous()
        pages, table = block_table.shape[1], block_table.data_ptr()
    if pages * page == 0 or entries == 0:
        if lse is not None:
            lse.copy_(without_keys(q, v_cache, options)[1])
        return out.zero_()
    lengths = lengths.contiguous()
    if slopes is not None:
        slopes = slopes.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    module().attention_decode(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), address(slopes), address(sinks),
        lengths.data_ptr(), table, out.data_ptr(), address(lse),
        q.stride()[:3], k_cache.stride()[:3], v_cache.stride()[:3],
        B, Tq, pages * page, H, Hk, D, Dv, pages, page, entries, options.left, options.right,
        options.alibi_stride, num_splits, options.softmax_scale, options.softcap,
        DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
