"""The formulas of the ops, written out in plain PyTorch. They define every result.

They take any floating dtype. In fp64 they are the truth with which all implementations are compared
(`gptkernels.truth.parity`). The signatures are those of the public functions, without `impl` and
other arguments that do not change the result, and with `rng`, the (seed, offset) that dropout uses
(`gptkernels.core.philox`). Autograd differentiates them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import philox


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    rng: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """s = dropout(x) + residual; y = (s - mean) / sqrt(var + eps) * weight + bias.

    Ba et al., 2016. x and residual are (..., C), weight and bias (C,). Mean and variance (the mean
    squared deviation) are taken over C. Returns y in x.dtype; with prenorm, (y, s).
    """
    s = x
    if dropout_p > 0:
        keep = philox.elementwise_keep(rng, dropout_p, x.shape)
        s = torch.where(keep, s * philox.scale(dropout_p), 0)
    if residual is not None:
        s = s + residual
    s = s.to(sum_dtype(x, residual, residual_in_fp32))
    mean = s.mean(dim=-1, keepdim=True)
    variance = (s - mean).square().mean(dim=-1, keepdim=True)
    y = (s - mean) / torch.sqrt(variance + eps) * weight
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    return (y, s) if prenorm else y


def sum_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """Returns the dtype of s: x's, or fp32 if `residual_in_fp32` or if the residual is in fp32."""
    wants_fp32 = residual_in_fp32 or (residual is not None and residual.dtype == torch.float32)
    return torch.promote_types(x.dtype, torch.float32) if wants_fp32 else x.dtype


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """y = gelu(x w1^T + b1) w2^T + b2; x (..., C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,).

    gelu(h) = h Phi(h) (Hendrycks and Gimpel, 2016). Phi is the normal distribution function: exact
    ("none"), or approximated by 0.5 (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) ("tanh").
    """
    h = x @ w1.T
    if b1 is not None:
        h = h + b1
    if approximate == "tanh":
        phi = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        phi = 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    y = (h * phi) @ w2.T
    return y if b2 is None else y + b2


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The losses of x (..., C) whose classes have the logits l = x weight^T + bias, or
    softcap tanh(l / softcap) of them; or their sum, or their mean over the rows that count.

    A row with the target t has the loss lse - (1 - label_smoothing) l[t]
    - label_smoothing mean(l) + z_loss lse^2, where lse = log sum exp(l); one whose target is
    `ignore_index` has 0. weight (V, C), bias (V,), targets (...) int64.
    """
    logits = torch.einsum("...c,vc->...v", x, weight)
    if bias is not None:
        logits = logits + bias
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    counts = targets != ignore_index
    highest = logits.detach().amax(-1, keepdim=True)
    lse = (highest + torch.log(torch.exp(logits - highest).sum(-1, keepdim=True))).squeeze(-1)
    at = logits.gather(-1, torch.where(counts, targets, 0)[..., None]).squeeze(-1)
    losses = lse - (1 - label_smoothing) * at + z_loss * lse**2
    if label_smoothing > 0:
        losses = losses - label_smoothing * logits.mean(-1)
    losses = losses.masked_fill(~counts, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    rng: Tensor | None = None,
    first_batch: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = dropout(softmax(s)) v for q (B, Tq, H, D), k (B, Tk, Hk, D) and v (B, Tk, Hk, Dv), with
    H % Hk == 0.

    In this order: s = scale * q.k; s = softcap * tanh(s / softcap);
    s = s - slope * |i + Tk - Tq - j|; s = s + attn_mask; s = -inf where the key is hidden. The
    slopes are (H,) or (B, H). Each of the sinks (H,) is one more score of its head in the softmax,
    whose weight meets no value.

    Returns out (B, Tq, H, Dv); with return_lse, (out, lse) with lse = log sum exp s, (B, H, Tq). A
    row whose scores are all -inf gives out 0 and lse -inf, and no gradient. `first_batch` is the
    number of the first batch entry: dropout's mask depends on it.
    """
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    if key_lengths is not None:
        # What lies past a length may be NaN, and 0 * NaN is NaN. So zeros replace it.
        dead = torch.arange(Tk, device=k.device) >= key_lengths[:, None]
        k, v = (x.masked_fill(dead[:, :, None, None], 0) for x in (k, v))
    k, v = (x.repeat_interleave(H // Hk, dim=2) for x in (k, v))
    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    position = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq
    key = torch.arange(Tk, device=q.device)
    if alibi_slopes is not None:
        slopes = torch.as_tensor(alibi_slopes, device=s.device).to(s.dtype)
        s = s - slopes[..., None, None] * (position - key).abs()
    visible = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        left, right = window
        if left >= 0:
            visible = visible & (position - left <= key)
        if right >= 0:
            visible = visible & (key <= position + right)
    if key_lengths is not None:
        visible = visible & (key < key_lengths[:, None])[:, None, None, :]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            s = s + attn_mask.to(s.dtype)
    s = s.masked_fill(~visible, -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype).view(-1, 1, 1).expand(B, H, Tq, 1)), dim=-1)
    highest = (
        s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((B, H, Tq, 1), -math.inf)
    )
    highest = highest.masked_fill(highest == -math.inf, 0)
    weights = torch.exp(s - highest)
    total = weights.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1)
    lse = (highest + torch.log(total)).masked_fill(none, -math.inf)
    p = (weights / total)[..., :Tk]
    if dropout_p > 0:
        keep = philox.attention_keep(rng, dropout_p, B, H, Tq, Tk, first_batch=first_batch)
        p = p * keep * philox.scale(dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    return (out, lse.squeeze(-1)) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each of several sequences that are packed end to end.

    q (total_q, H, D), k and v (total_k, Hk, D). Sequence b has the queries from cu_seqlens_q[b] to
    cu_seqlens_q[b + 1] - 1, and the keys from cu_seqlens_k[b] to cu_seqlens_k[b + 1] - 1. Returns
    out (total_q, H, D); with return_lse, (out, lse) with lse (H, total_q).
    """
    return packed(attention, q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse, options)


def packed(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_lse: bool,
    options: Mapping[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the result of `attention_varlen`, computed with the given `attention`."""
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[-1])], [q.new_empty(q.shape[1], 0)]
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        sequences = (
            x[None, first:last] for x, first, last in ((q, q0, q1), (k, k0, k1), (v, k0, k1))
        )
        own = of_entry(options, b)
        result = attention(*sequences, return_lse=return_lse, first_batch=b, **own)
        out, lse = result if return_lse else (result, None)
        outs.append(out[0])
        if lse is not None:
            lses.append(lse[0])
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=1)) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each batch entry to the first cache_lengths[b] keys of its cache.

    q (B, Tq, H, D). The caches are (B, Tmax, Hk, D), or pages (N, page, Hk, D); then block_table
    (B, pages) has the numbers of each entry's pages, in order. The last query sees all of the
    cache_lengths[b] keys. Returns out (B, Tq, H, D); with return_lse, (out, lse) with lse
    (B, H, Tq).
    """
    return cached(attention, q, k_cache, v_cache, cache_lengths, block_table, return_lse, options)


def cached(
    attention: Callable[..., Any],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    return_lse: bool,
    options: Mapping[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns the result of `attention_decode`, computed with the given `attention`."""
    results = []
    for b, length in enumerate(cache_lengths.tolist()):
        k, v = (cache_of(x, b, length, block_table)[None] for x in (k_cache, v_cache))
        own = of_entry(options, b)
        results.append(attention(q[b : b + 1], k, v, return_lse=return_lse, **own))
    if return_lse:
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)
    return torch.cat(results)


def of_entry(options: Mapping[str, Any], b: int) -> Mapping[str, Any]:
    """The options of batch entry b, or of sequence b, alone: with its own slopes."""
    slopes = options.get("alibi_slopes")
    if isinstance(slopes, Tensor) and slopes.dim() == 2:
        return {**options, "alibi_slopes": slopes[b]}
    return options


def cache_of(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """Returns the first `length` keys, or values, of batch entry b: (length, Hk, D)."""
    if block_table is None:
        return cache[b, :length]
    page = cache.shape[1]
    pages = block_table[b, : -(-length // page)].long()
    return cache[pages].flatten(0, 1)[:length]
