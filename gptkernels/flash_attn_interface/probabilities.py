"""S_dmask: the weights of attention before they are divided by their sum, and which of them dropout
dropped, in the sign.

A kernel of flash-attn writes exp(score - m), where m is the largest score of the row so far, one
block of keys after another. Here m is the row's largest score, as with one block for all keys, so
S_dmask is the weight but for the row's sum. It is computed by the formula, with memory of Tq * Tk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import masks
from gptkernels.core.checks import check_probability, check_tensor
from gptkernels.flash_attn_interface.dropout_seed import upcoming
from gptkernels.ops.attention.options import AttentionOptions, complete, scale
from gptkernels.ops.attention.torch.formula import scores


def seed(q: Tensor, dropout_p: float) -> Tensor | None:
    """The (seed, offset) that the next call draws; None without dropout. Raises TypeError,
    ValueError."""
    check_tensor("q", q)
    check_probability("dropout_p", dropout_p)
    return upcoming(q.device) if dropout_p > 0 else None


@torch.no_grad()
def signed(
    q: Tensor,
    k: Tensor,
    rng: Tensor,
    dropout_p: float,
    options: Mapping[str, Any],
    first_batch: int = 0,
) -> Tensor:
    """S_dmask (B, H, Tq, Tk) in q's dtype, of q (B, Tq, H, D) and k (B, Tk, Hk, D).

    options are those of `arguments.scores`; first_batch is the number of the first batch entry, on
    which the mask depends.
    """
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    shape = {name: options[name] for name in ("causal", "window", "alibi_slopes")}
    record = AttentionOptions(
        softmax_scale=scale(options["softmax_scale"], q), softcap=options["softcap"]
    )
    record = complete(record, q, batch=B, **shape)
    if q.numel() == 0 or Tk == 0:
        return q.new_zeros(B, H, Tq, Tk)
    rows = k.transpose(1, 2).float()
    s, _ = scores(q, rows, slice(0, Tq), slice(0, Tk), record, None)
    highest = s.amax(-1, keepdim=True)
    p = torch.exp(s - highest.masked_fill(highest == -math.inf, 0)).to(q.dtype)
    keep = masks.attention_keep(rng, dropout_p, B, H, Tq, Tk, first_batch=first_batch)
    return torch.where(keep, p, -p)


def signed_packed(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rng: Tensor,
    dropout_p: float,
    options: Mapping[str, Any],
) -> Tensor:
    """S_dmask (B, H, max_seqlen_q, max_seqlen_k) of packed sequences, 0 past their lengths."""
    B, slopes = len(cu_seqlens_q) - 1, options["alibi_slopes"]
    found = q.new_zeros(B, q.shape[1], max_seqlen_q, max_seqlen_k)
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        p = signed(
            q[None, q0:q1], k[None, k0:k1], rng, dropout_p, {**options, "alibi_slopes": own}, b
        )
        found[b, :, : q1 - q0, : k1 - k0] = p[0]
    return found
