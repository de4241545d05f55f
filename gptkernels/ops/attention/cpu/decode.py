"""Calls of decoding's CPU kernel. The formula is in csrc/cpu/attention/decode/params.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptkernels.core.cpu import DTYPE_CODES, module
from gptkernels.ops.attention.options import AttentionOptions


def attention_decode_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k_cache: Tensor,  # (B, Tmax, Hk, D), or pages (N, page, Hk, D)
    v_cache: Tensor,
    block_table: Tensor | None,  # (B, pages) int32
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, D) and lse (B, H, Tq) in fp32. num_splits is 0 where the user gave
    none."""
    (B, Tq, H, D), (entries, page, Hk, _) = q.shape, k_cache.shape
    out = torch.empty((B, Tq, H, D), dtype=q.dtype)
    lse = torch.empty((B, H, Tq), dtype=torch.float32)
    if B == 0 or Tq == 0 or H == 0:
        return out, lse
    lengths, slopes, pages, table = options.key_lengths, options.alibi_slopes, 1, 0
    assert lengths is not None
    if block_table is not None:
        block_table = block_table.contiguous()
        pages, table = block_table.shape[1], block_table.data_ptr()
    if pages * page == 0 or entries == 0:
        return out.zero_(), lse.fill_(-math.inf)
    lengths = lengths.contiguous()
    if slopes is not None:
        slopes = slopes.contiguous()
    module().attention_decode(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        0 if slopes is None else slopes.data_ptr(), lengths.data_ptr(), table,
        out.data_ptr(), lse.data_ptr(), q.stride(), k_cache.stride(), v_cache.stride(),
        B, Tq, pages * page, H, Hk, D, pages, page, entries, options.left, num_splits,
        options.softmax_scale, options.softcap, DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, lse
