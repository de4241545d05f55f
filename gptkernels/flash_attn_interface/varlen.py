"""flash_attn_varlen_func and its packed forms: attention of sequences laid end to end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gptkernels.flash_attn_interface import arguments, pages, probabilities
from gptkernels.flash_attn_interface.arguments import Window
from gptkernels.ops.attention.varlen import attention_varlen


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of packed sequences, as `flash_attn.flash_attn_varlen_func`, by
    `gptkernels.attention_varlen`.

    Args:
        q: Queries (total_q, H, D), float32, bfloat16 or float16.
        k, v: Keys and values (total_k, Hk, D), in q's dtype; with a block_table pages
            (N, page, Hk, D) of them, of any size.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where sequences begin and end.
        max_seqlen_q, max_seqlen_k: Length of the longest sequence, or any larger number.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic: As for
            `flash_attn_func`.
        return_attn_probs: Whether to return all three results below. For tests: S_dmask takes
            memory of max_seqlen_q * max_seqlen_k for each sequence.
        block_table: (B, pages) int32, the numbers of a sequence's pages, in order. The keys and
            values are gathered into memory of their own first; on a GPU the call waits for the
            lengths. Differentiable too.

    Returns:
        out (total_q, H, D); or (out, softmax_lse, S_dmask). softmax_lse is (H, total_q) float32,
        +inf where a query sees no key. S_dmask (B, H, max_seqlen_q, max_seqlen_k) is that of
        `flash_attn_func`, 0 past the lengths; it is empty, (0,), without dropout.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: As `gptkernels.attention_varlen`.
    """
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        k, v = (pages.gathered(n, x, cu_seqlens_k, block_table) for n, x in (("k", k), ("v", v)))
    q, k, v = (arguments.unit_stride(x) for x in (q, k, v))
    longest = (
        arguments.integer("max_seqlen_q", max_seqlen_q),
        arguments.integer("max_seqlen_k", max_seqlen_k),
    )
    rng = probabilities.seed(q, dropout_p) if return_attn_probs else None
    found = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, dropout_p=dropout_p,
        deterministic=arguments.determinism(deterministic), return_lse=return_attn_probs,
        **options,
    )  # fmt: skip
    if not isinstance(found, tuple):
        return found
    out, lse = found
    if rng is None:
        return out, arguments.logsumexp(lse), q.new_empty(0)
    p = probabilities.signed_packed(
        q, k, cu_seqlens_q, cu_seqlens_k, *longest, rng, dropout_p, options
    )
    return out, arguments.logsumexp(lse), p


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D), which holds queries, keys and values. The
    other arguments, the results and the errors are those of `flash_attn_varlen_func`."""
    q, k, v = arguments.unpacked("qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (total_q, H, D) and kv (total_k, 2, Hk, D), which holds keys
    and values. The other arguments, the results and the errors are those of
    `flash_attn_varlen_func`."""
    k, v = arguments.unpacked("kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
