"""The ops as users write them today in eager PyTorch, in the dtype of their tensors.

This is the yardstick for speed (`gptkernels.bench`) and, with sums in fp32
(`gptkernels.truth.yardstick`), for errors (`gptkernels.truth.parity`). It shares no code with
impl="torch", and with `reference` only the loops over sequences. It has the signatures of
`reference`. Dropout uses the mask of `gptkernels.core.philox`, since PyTorch's own dropout draws
another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core import philox
from gptkernels.truth import reference


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
    """Dropout, an addition and F.layer_norm. The shapes are those of `reference.layer_norm`."""
    s = x
    if dropout_p > 0:
        s = s.masked_fill(~philox.elementwise_keep(rng, dropout_p, x.shape), 0) * philox.scale(
            dropout_p
        )
    if residual is not None:
        s = s + residual
    if residual_in_fp32 or (residual is not None and residual.dtype == torch.float32):
        s = s.float()
    else:
        s = s.to(x.dtype)
    weight = weight.to(s.dtype)
    bias = None if bias is None else bias.to(s.dtype)
    y = F.layer_norm(s, (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return (y, s) if prenorm else y


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "tanh",
) -> Tensor:
    """F.linear, F.gelu, F.linear. The shapes are those of `reference.gelu_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


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
    """F.linear, F.cross_entropy of its outputs in fp32. The shapes are those of
    `reference.linear_cross_entropy`."""
    logits = F.linear(x, weight, bias).float()
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(targets.shape)
    counts = (targets != ignore_index).to(losses.dtype)
    if z_loss > 0:
        losses = losses + z_loss * counts * logits.logsumexp(-1).square()
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
    """F.scaled_dot_product_attention (SDPA) where it has all options of the call, else products and
    a softmax. The shapes are those of `reference.attention`."""
    (Tq, H, D), (Tk, Hk) = q.shape[1:], k.shape[1:3]
    plain = softcap == 0 and alibi_slopes is sinks is None and dropout_p == 0 and not return_lse
    fused = plain and (attn_mask is None or attn_mask.dtype == torch.bool)
    # SDPA's own causal flag aligns queries and keys at the first key, ours at the last key. SDPA
    # takes no mask together with its flag.
    flag = fused and causal and Tq == Tk and window is key_lengths is attn_mask is None
    mask = None if flag else band_mask(q.device, Tq, Tk, causal=causal, window=window)
    if key_lengths is not None:
        alive = torch.arange(Tk, device=q.device) < key_lengths.view(-1, 1, 1, 1)
        mask = alive if mask is None else mask & alive
        k, v = (torch.where(alive.view(-1, Tk, 1, 1), x, 0) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask if mask is None else mask & attn_mask
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = Hk != H
    if grouped and (mask is not None or not fused):
        # SDPA's fused kernels take a mask or grouped heads, but not both. With both, SDPA would
        # store all scores.
        k, v = k.repeat_interleave(H // Hk, dim=1), v.repeat_interleave(H // Hk, dim=1)
        grouped = False
    if fused:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=flag, scale=softmax_scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    s = q @ k.mT * (D**-0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        s = torch.tanh(s / softcap) * softcap
    if alibi_slopes is not None:
        distance = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - torch.arange(
            Tk, device=q.device
        )
        slopes = torch.as_tensor(alibi_slopes, device=q.device)
        s = s - (slopes[..., None, None] * distance.abs()).to(s.dtype)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        s = s + attn_mask.to(s.dtype)
    empty = torch.zeros((), dtype=torch.bool, device=q.device)
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # as transformers' gpt-oss computes it
        s = torch.cat((s, sinks.to(s.dtype).view(-1, 1, 1).expand(*s.shape[:-1], 1)), dim=-1)
    elif mask is not None:
        empty = ~mask.any(-1, keepdim=True)
    # softmax of a row without keys would be NaN, so such a row gets finite scores first.
    p = torch.softmax(s.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    lse = torch.logsumexp(s.masked_fill(empty, 0), dim=-1, keepdim=True)
    lse = lse.masked_fill(empty, float("-inf")).squeeze(-1)
    if dropout_p > 0:
        B = q.shape[0]
        keep = philox.attention_keep(rng, dropout_p, B, H, Tq, Tk, first_batch=first_batch)
        p = p[..., :Tk].masked_fill(~keep, 0) * philox.scale(dropout_p)
    out = (p[..., :Tk] @ v).transpose(1, 2)
    return (out, lse) if return_lse else out


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
    """`attention` of one sequence after the other. The shapes are those of
    `reference.attention_varlen`."""
    ends = (cu_seqlens_q, cu_seqlens_k)
    return reference.packed(attention, q, k, v, *ends, return_lse, options)


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
    """`attention` of one batch entry after the other. The shapes are those of
    `reference.attention_decode`."""
    caches = (k_cache, v_cache, cache_lengths, block_table)
    return reference.cached(attention, q, *caches, return_lse, options)


def band_mask(
    device: torch.device, Tq: int, Tk: int, *, causal: bool, window: tuple[int, int] | None
) -> Tensor | None:
    """Returns the bool mask (Tq, Tk) of `causal` and `window`; None where every key is visible."""
    left, right = window or (-1, -1)
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if right >= 0:
        mask = mask.tril(Tk - Tq + right)
    return mask.triu(Tk - Tq - left) if left >= 0 else mask
