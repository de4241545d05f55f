"""Launcher of the CUDA C++ decoding kernel (csrc/attention/decode/kernel.h has the formula)."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.native import call, dtype_code
from gptkernels.ops.attention import limits
from gptkernels.ops.attention.options import AttentionOptions, without_keys


def attention_decode_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k_cache: Tensor,  # (B, Tmax, Hk, D), or pages (N, page, Hk, D)
    v_cache: Tensor,
    block_table: Tensor | None,  # (B, pages) int32
    num_splits: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Tq, H, D) and lse (B, H, Tq) in fp32. num_splits is 0 where the user gave
    none. Raises NotImplementedError for what `limits` names."""
    limits.refuse("cuda", "attention_decode", q, v_cache, options)
    (B, Tq, H, D), (entries, page, Hk) = q.shape, k_cache.shape[:3]
    pages = 1 if block_table is None else block_table.shape[1]
    room = min(pages * page, 2**31 - 1)  # lengths are int32
    if q.numel() == 0 or room == 0 or entries == 0:
        return without_keys(q, v_cache, options)
    out = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    given = options.vectors
    call(
        "attention_decode",
        q,
        inputs=dict(
            q=q, k=k_cache, v=v_cache,
            alibi_slopes=given["alibi_slopes"],
            sinks=given["sinks"],
            key_lengths=given["key_lengths"],
            block_table=None if block_table is None else block_table.contiguous(),
        ),
        outputs=dict(out=out, lse=lse),
        workspaces=dict(partial_out=torch.float32, partial_stats=torch.float32),
        dtype=dtype_code(q.dtype),
        q_strides=q.stride()[:3], k_strides=k_cache.stride()[:3], v_strides=v_cache.stride()[:3],
        batch=B, Tq=Tq, Tk=room, H=H, Hk=Hk, D=D, **options.scores,
        alibi_stride=options.alibi_stride,
        pages=pages, page=page, cache_pages=entries, num_splits=num_splits,
    )  # fmt: skip
    return out, lse
