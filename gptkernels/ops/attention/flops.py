"""What attention's products take, as PyTorch counts them (core/flops.py): of every query and every
key of its sequence, for a cache up to its length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptkernels.core.flops import values
from gptkernels.ops.attention.options import AttentionOptions


def forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, impl: str) -> int:
    """q k^T and p v."""
    return 2 * _scores(q, k, options) * (q.shape[-1] + v.shape[-1])


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    *_: Any,
) -> int:
    """q k^T again, dout v^T, p^T dout, ds k and ds^T q, whichever gradients are wanted."""
    return 2 * _scores(q, k, options) * (3 * q.shape[-1] + 2 * v.shape[-1])


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    num_splits: int,
    options: AttentionOptions,
    impl: str,
) -> int:
    """q k^T and p v of the keys that a cache holds."""
    B, Tq, H, D = q.shape
    assert options.key_lengths is not None
    lengths: Sequence[int] | None = values(options.key_lengths)
    if lengths is None:
        pages = 1 if block_table is None else block_table.shape[1]
        lengths = [k_cache.shape[1] * pages] * B
    return 2 * Tq * H * sum(lengths) * (D + v_cache.shape[-1])


def _scores(q: Tensor, k: Tensor, options: AttentionOptions) -> int:
    """How many scores there are."""
    B, Tq, H, _ = q.shape
    if options.cu_seqlens_q is None or options.cu_seqlens_k is None:
        return B * H * Tq * k.shape[1]
    queries = _lengths(options.cu_seqlens_q, options.max_seqlen_q)
    keys = _lengths(options.cu_seqlens_k, options.max_seqlen_k)
    return H * sum(a * b for a, b in zip(queries, keys, strict=True))


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    ends = values(cu_seqlens)
    if ends is None:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return [end - start for start, end in itertools.pairwise(ends)]
