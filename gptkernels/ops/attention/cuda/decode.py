"""Launcher of the CUDA C++ decoding kernel (csrc/attention/decode/kernel.h has the formula)."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.native import call, dtype_code
from gptkernels.ops.attention.cuda.dense import vectors
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.splits import most_splits


def attention_decode_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k_cache: Tensor,  # (B, Tmax, Hk, D), or pages (N, page, Hk, D)
    v_cache: Tensor,
    block_table: Tensor | None,  # (B, pages) int32
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, D) and lse (B, H, Tq) fp32. num_splits: 0 where none is given."""
    (B, Tq, H, D), (entries, page, Hk) = q.shape, k_cache.shape[:3]
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    pages = 1 if block_table is None else block_table.shape[1]
    room = min(pages * page, 2**31 - 1)  # lengths are int32
    if room == 0 or entries == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    splits = most_splits(room, num_splits)
    partial_out = partial_stats = None
    if splits > 1:
        partials = (B, Hk, splits, Tq * H // Hk)
        width = -(-D // 4) * 4
        partial_out = torch.empty((*partials, width), dtype=torch.float32, device=q.device)
        partial_stats = torch.empty((*partials, 2), dtype=torch.float32, device=q.device)
    given = vectors(options)
    call(
        "attention_decode",
        q,
        inputs=dict(
            q=q, k=k_cache, v=v_cache,
            cache_lengths=given["key_lengths"],
            block_table=None if block_table is None else block_table.contiguous(),
            alibi_slopes=given["alibi_slopes"],
        ),
        outputs=dict(partial_out=partial_out, partial_stats=partial_stats, out=out, lse=lse),
        dtype=dtype_code(q.dtype),
        batch=B, Tq=Tq, Tk=room, H=H, Hk=Hk, D=D,
        pages=pages, page=page, cache_pages=entries,
        q_strides=q.stride()[:3], k_strides=k_cache.stride()[:3], v_strides=v_cache.stride()[:3],
        scale=options.softmax_scale, left=options.left, softcap=options.softcap,
        num_splits=num_splits, splits=splits,
    )  # fmt: skip
    return out, lse
