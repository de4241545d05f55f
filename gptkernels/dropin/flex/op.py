"""`flex_attention`: PyTorch's function of that name, of what attention's options can say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptkernels.core.checks import check_flag, check_number
from gptkernels.dropin.flex import blocks, expression, masks, scores
from gptkernels.dropin.flex.expression import BATCH, HEAD, INDICES, SCORE, Unknown
from gptkernels.dropin.flex.scores import Scores
from gptkernels.ops.attention.dense import attention
from gptkernels.ops.attention.varlen import attention_varlen

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    impl: str = "auto",
) -> Any:
    """torch.nn.attention.flex_attention.flex_attention by `gptkernels.attention`, or by
    `attention_varlen` for documents.

    Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
    2024. The mask_mod and the score_mod are read as expressions at every call, since numbers and
    tensors of their closures may change; that takes about a millisecond. Known are conjunctions of

        q_idx >= kv_idx                     and other bounds of q_idx - kv_idx, abs() of it too
        kv_idx < lengths[b]                 and constants: the keys of an entry end there
        documents[q_idx] == documents[kv_idx]       or documents[b, q_idx], q_idx // 64 ...: a token
                                            sees its own document, whose tokens follow each other

    and scores of the form, each part optional and in this order,

        score * factor
        cap * tanh(score / cap)
        score + slopes[h] * (kv_idx - q_idx)        where no key behind the query is visible
        score - slopes[h] * abs(q_idx - kv_idx)
        torch.where(mask, score, -inf)      of a known mask

    where slopes[h] may be any expression of b and h. Positions count from the first query and the
    first key, as in PyTorch.

    Args:
        query: (B, H, Tq, D), float32, bfloat16 or float16.
        key, value: (B, Hk, Tk, D), in query's dtype.
        score_mod: A function (score, b, h, q_idx, kv_idx), or None.
        block_mask: A BlockMask, or None. The blocks that it lists have to be those of its mask_mod.
        scale: Factor of the scores; None means 1 / sqrt(D).
        enable_gqa: Whether key and value may have fewer heads than query.
        return_lse: Whether to return lse as well.
        kernel_options: None, or empty: they are those of PyTorch's kernels.
        return_aux: Whether to return an AuxOutput as well, with lse if asked for.
        impl: As for `gptkernels.attention`; PyTorch's function has no such argument.

    Returns:
        out (B, H, Tq, D) in query's dtype; with return_lse, (out, lse), with return_aux,
        (out, AuxOutput), where lse is (B, H, Tq) float32 and differentiable too.

    Raises:
        NotImplementedError: The mask or the score has a form that is not known, which is printed;
            or kernel_options or maximal scores are asked for.
        TypeError, ValueError, RuntimeError: As `gptkernels.attention`, and for a block_mask of
            other lengths.

    Differentiable once in query, key, value and slopes. torch.compile breaks its graph here.
    """
    _check_types(score_mod, block_mask, return_aux)
    check_flag("enable_gqa", enable_gqa)
    if scale is not None:
        check_number("scale", scale)
    if kernel_options:
        raise NotImplementedError(
            f"kernel_options are those of PyTorch's kernels, got {sorted(kernel_options)}; impl "
            "chooses among this package's"
        )
    if return_aux is not None:
        if return_lse:
            raise ValueError("return_lse and return_aux exclude each other: give return_aux alone")
        if return_aux.max_scores:
            raise NotImplementedError("return_aux has no max_scores: the kernels do not keep them")
    if query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have the {query.shape[1]} heads of query unless enable_gqa=True, "
            f"got {key.shape[1]}"
        )
    lse_too = return_lse or (return_aux is not None and return_aux.lse)
    out, lse = _run(query, key, value, score_mod, block_mask, scale, lse_too, impl)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse)
    return (out, lse) if return_lse else out


def _check_types(score_mod: Any, block_mask: Any, return_aux: Any) -> None:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod must be a function or None, got {type(score_mod).__name__}")
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(
            "block_mask must be a BlockMask, as create_block_mask(mask_mod, ...) returns, "
            f"got {type(block_mask).__name__}"
        )
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux must be an AuxRequest, got {type(return_aux).__name__}")


# What the functions say depends on values. Given to torch.compile, a function is compiled although
# it is disabled; those that it calls are not.
@torch.compiler.disable
def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None,
    block_mask: BlockMask | None,
    scale: float | None,
    return_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    """Returns out and, if asked for, lse."""
    wanted = _wanted(score_mod, block_mask, query, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    options = {
        "softmax_scale": wanted.factor * scale,
        "softcap": wanted.softcap,
        "return_lse": return_lse,
        "impl": impl,
    }
    q, k, v = map(_tokens_first, (query, key, value))
    call = _documents if wanted.mask.documents else _dense
    found = call(q, k, v, wanted, options)
    out, lse = found if return_lse else (found, None)
    return out.transpose(1, 2), lse


def _tokens_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _wanted(
    score_mod: Callable[..., Any] | None,
    block_mask: BlockMask | None,
    query: Tensor,
    key: Tensor,
) -> Scores:
    """What both functions say, the mask of both in one."""
    found = Scores()
    if score_mod is not None:
        found = scores.known(expression.read(score_mod, "score_mod", (SCORE, *INDICES)))
    if block_mask is None:
        return found
    B, Tq, Tk = query.shape[0], query.shape[2], key.shape[2]
    if tuple(block_mask.seq_lengths) != (Tq, Tk) or block_mask.shape[0] not in (1, B):
        raise ValueError(
            f"block_mask must be one of {B} or 1 entries, {Tq} queries and {Tk} keys, got shape "
            f"{tuple(block_mask.shape)}"
        )
    visible = expression.read(block_mask.mask_mod, "mask_mod", INDICES)
    blocks.check(block_mask, *masks.known(visible).intervals(B, Tq, Tk, query.device), Tk)
    return replace(found, mask=masks.known(visible, found.mask))


def _dense(q: Tensor, k: Tensor, v: Tensor, wanted: Scores, options: dict[str, Any]) -> Any:
    """Positions of `attention` are aligned at the last query and key, here at the first ones: keys
    behind those that anybody sees are cut off, and the window moves by the rest."""
    mask, (B, Tq), Tk = wanted.mask, q.shape[:2], k.shape[1]
    lengths = mask.lengths(B, Tk, q.device)
    if mask.right is not None:
        Tk = min(Tk, max(Tq + mask.right, 0))
    shift = Tk - Tq
    left = -1 if mask.left is None else mask.left + shift
    right = -1 if mask.right is None else max(mask.right - shift, 0)
    if mask.left is not None and left < 0:
        raise NotImplementedError(
            f"the last of {Tq} queries see no key: only windows that reach some of the {Tk} keys "
            f"are known, got one of {mask.left} keys to the left"
        )
    if wanted.slopes is not None and shift:
        raise NotImplementedError(
            "slopes of ALiBi are known where the last query is at the last visible key, got "
            f"{Tq} queries and {Tk} keys"
        )
    return attention(
        q,
        k[:, :Tk],
        v[:, :Tk],
        causal=right == 0,
        window=None if left < 0 and right <= 0 else (left, right),
        alibi_slopes=_slopes(wanted, B, q.shape[2], q.device),
        key_lengths=None if lengths is None else lengths.clamp(max=Tk).int(),
        **options,
    )


def _documents(q: Tensor, k: Tensor, v: Tensor, wanted: Scores, options: dict[str, Any]) -> Any:
    """All documents of all entries, packed end to end."""
    mask, (B, T, H, _) = wanted.mask, q.shape
    if mask.ends:
        raise NotImplementedError(
            f"documents together with ends of the keys ({mask.ends[0]}) are not known: give the "
            "tokens behind an end a document of their own"
        )
    numbers = mask.numbers(B, T, q.device)
    first = torch.arange(B, device=q.device)[:, None] * T
    documents, counts = torch.unique_consecutive((numbers + first).flatten(), return_counts=True)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest = max(counts.tolist(), default=0)
    slopes = _slopes(wanted, B, H, q.device)
    left = -1 if mask.left is None else mask.left
    right = -1 if mask.right is None else mask.right
    if min(mask.left or 0, mask.right or 0) < 0:
        raise NotImplementedError(
            "within documents a window has to hold the query's own position, got q_idx - "
            f"{mask.left} <= kv_idx <= q_idx + {mask.right}"
        )
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[documents // T]
    found: Any = attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        ends,
        ends,
        longest,
        longest,
        causal=right == 0,
        window=None if left < 0 and right <= 0 else (left, right),
        alibi_slopes=slopes,
        **options,
    )
    if not options["return_lse"]:
        return found.unflatten(0, (B, T))
    out, lse = found
    return out.unflatten(0, (B, T)), lse.unflatten(1, (B, T)).transpose(0, 1)


def _slopes(wanted: Scores, B: int, H: int, device: torch.device) -> Tensor | None:
    """The slopes of ALiBi, (H,) or (B, H)."""
    if wanted.slopes is None:
        return None
    if not wanted.even and (wanted.mask.right is None or wanted.mask.right > 0):
        raise Unknown(
            "a score + slopes * (kv_idx - q_idx) is known where no key behind the query is "
            "visible, as with q_idx >= kv_idx; else write score - slopes * abs(q_idx - kv_idx)"
        )
    b, h = torch.arange(B, device=device)[:, None], torch.arange(H, device=device)
    found = torch.as_tensor(expression.value(wanted.slopes, {BATCH: b, HEAD: h}), device=device)
    return found.float().expand((B, H) if BATCH in expression.names(wanted.slopes) else (H,))
