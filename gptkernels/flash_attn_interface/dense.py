"""flash_attn_func and its packed forms: attention of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gptkernels.flash_attn_interface import arguments, probabilities
from gptkernels.flash_attn_interface.arguments import Window
from gptkernels.ops.attention.dense import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention, as `flash_attn.flash_attn_func`, by `gptkernels.attention`, which has the formula.

    Args:
        q: Queries (B, Tq, H, D), float32, bfloat16 or float16.
        k, v: Keys and values (B, Tk, Hk, D), in q's dtype; H is a multiple of Hk.
        dropout_p: Probability of dropping a weight; give 0.0 outside training.
        softmax_scale: Factor of the scores; None means 1 / sqrt(D).
        causal: Whether a query sees only the keys up to its own position, the last query and the
            last key being at one position.
        window_size: (left, right), integers or a tensor of two: the farthest keys that a query
            sees on either side. Below 0: no bound.
        softcap: Bound on the scores; 0 or less means none.
        alibi_slopes: (H,) or (B, H).
        deterministic: Whether gradients must repeat their bits. PyTorch's own switch,
            torch.use_deterministic_algorithms, asks for that too.
        return_attn_probs: Whether to return all three results below. For tests: S_dmask takes
            memory of Tq * Tk.

    Returns:
        out (B, Tq, H, D); or (out, softmax_lse, S_dmask). softmax_lse is (B, H, Tq) float32, +inf
        where a query sees no key. S_dmask (B, H, Tq, Tk), in q's dtype, is exp(score - largest
        score of its row), negative where dropout dropped it; it is empty, (0,), without dropout.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: As `gptkernels.attention`.

    Differentiable once in q, k, v, alibi_slopes; softmax_lse is differentiable too, other than in
    flash-attn.
    """
    options = arguments.scores(softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = (arguments.unit_stride(x) for x in (q, k, v))
    rng = probabilities.seed(q, dropout_p) if return_attn_probs else None
    found = attention(
        q, k, v, dropout_p=dropout_p, deterministic=arguments.determinism(deterministic),
        return_lse=return_attn_probs, **options,
    )  # fmt: skip
    if not isinstance(found, tuple):
        return found
    out, lse = found
    p = q.new_empty(0) if rng is None else probabilities.signed(q, k, rng, dropout_p, options)
    return out, arguments.logsumexp(lse), p


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, T, 3, H, D), which holds queries, keys and values. The other
    arguments, the results and the errors are those of `flash_attn_func`."""
    q, k, v = arguments.unpacked("qkv", qkv, 2, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (B, Tq, H, D) and kv (B, Tk, 2, Hk, D), which holds keys and values.
    The other arguments, the results and the errors are those of `flash_attn_func`."""
    k, v = arguments.unpacked("kv", kv, 2, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip
