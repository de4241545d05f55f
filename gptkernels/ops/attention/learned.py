"""What a model may learn besides q, k and v: ALiBi slopes, and sinks.

A sink is a score of its head that belongs to no key (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023; gpt-oss has one for each head): it takes its part of the
softmax, and adds nothing to out. With the lse of a query's keys alone,

    lse' = log(exp(lse) + exp(sink)),    out' = out exp(lse - lse').

The backward pass of attention holds unchanged for out' and lse', as each weight is exp(s - lse').
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns out' (B, Tq, H, D) and lse' (B, H, Tq) of out and lse without sinks (H,)."""
    if sinks is None:
        return out, lse
    both = torch.logaddexp(lse, sinks[:, None])
    part = torch.exp(lse - both).masked_fill(lse == -math.inf, 0)
    return (out * part.transpose(1, 2)[..., None]).to(out.dtype), both


def sinks_gradient(
    dout: Tensor, out: Tensor, dlse: Tensor | None, lse: Tensor, sinks: Tensor
) -> Tensor:
    """Returns dsinks (H,) = sum over the queries of exp(sink - lse) (dlse - sum(dout out)), with
    dout and out (B, Tq, H, D), dlse and lse (B, H, Tq)."""
    change = -(dout.float() * out.float()).sum(-1).transpose(1, 2)
    if dlse is not None:
        change = change + dlse
    # A query whose scores and sink are all -inf has no weights.
    weight = torch.exp(sinks[:, None] - lse).masked_fill(lse == -math.inf, 0)
    return (weight * change).sum((0, 2))


def slopes_gradient(by_query: Tensor, options: AttentionOptions) -> Tensor:
    """Returns dslopes, of the slopes' shape (H,) or (B, H), from by_query (B, H, Tq): the sums over
    a query's keys of dS |position - key|. The sums over queries have the same bits on every run."""
    slopes, ends = options.alibi_slopes, options.cu_seqlens_q
    assert slopes is not None
    if slopes.dim() == 1:
        return -by_query.sum((0, 2))
    if ends is None:
        return -by_query.sum(2)
    total = by_query.shape[2]
    ends = ends.clamp(0, total)
    place = ends[:-1, None] + torch.arange(min(options.max_seqlen_q, total), device=ends.device)
    rows = by_query[0][:, place.clamp(max=max(total - 1, 0))]
    return -rows.masked_fill(place >= ends[1:, None], 0).sum(-1).T.contiguous()
