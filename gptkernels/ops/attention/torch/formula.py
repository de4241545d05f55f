"""Attention by the formula in fp32, one block of query rows after another. It has every option."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptkernels.core import masks, philox
from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.torch.blocks import (
    hidden_keys,
    living_keys,
    mask_block,
    positions,
    row_blocks,
    seen_keys,
)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    first_batch: int,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns out and lse by the formula in fp32, one block of query rows after another."""
    (B, Tq, H, _), Tk, Dv = q.shape, k.shape[1], v.shape[-1]
    sink = None if options.sinks is None else options.sinks[:, None, None]
    out = torch.empty((B, Tq, H, Dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    k, v = (living_keys(x.transpose(1, 2).float(), options.key_lengths) for x in (k, v))
    for rows in row_blocks(B * H * Tk, Tq):
        keys = seen_keys(options, rows, Tq, Tk, shift)
        if keys.start == keys.stop:
            out[:, rows], lse[:, :, rows] = without_keys(q[:, rows], v, options)
            continue
        s, _ = scores(q, k, rows, keys, options, shift)
        highest = s.amax(-1, keepdim=True)
        if sink is not None:
            highest = torch.maximum(highest, sink)
        highest = highest.masked_fill(highest == -math.inf, 0)
        p = s.sub_(highest).exp_()
        total = p.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink - highest).exp()
        lse[:, :, rows] = (highest + total.log()).squeeze(-1)
        p = p.div_(total.masked_fill(total == 0, 1))
        if options.dropout_p > 0:
            p = p.mul_(_dropout(q, rows, keys, options, first_batch))
        product = _by_group(p, k.shape[1]) @ v[:, :, keys]
        out[:, rows] = product.view(B, H, -1, Dv).transpose(1, 2).to(q.dtype)
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    first_batch: int,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients by the formula dS = P (dP - sum(P dP) + dlse) in fp32, one block of
    query rows after another, and by_query."""
    (B, Tq, H, D), (Tk, Hk), dtype = q.shape, k.shape[1:3], q.dtype
    want_q, want_k, want_v, want_mask, want_slopes = grad_mask
    dq = torch.empty((B, Tq, H, D) if want_q else (0,), dtype=dtype, device=q.device)
    k, v = (living_keys(x.transpose(1, 2).float(), options.key_lengths) for x in (k, v))
    dk, dv = (
        torch.zeros(x.shape if wanted else (0,), dtype=torch.float32, device=q.device)
        for x, wanted in ((k, want_k), (v, want_v))
    )
    by_query = torch.zeros(lse.shape if want_slopes else (0,), dtype=torch.float32, device=q.device)
    mask = options.attn_mask if want_mask else None
    shape = (0,) if mask is None else mask.shape
    dmask = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for rows in row_blocks(B * H * Tk, Tq):
        keys = seen_keys(options, rows, Tq, Tk, shift)
        if keys.start == keys.stop:
            if want_q:
                dq[:, rows] = 0
            continue
        s, cap = scores(q, k, rows, keys, options, shift)
        # The weights of a row without keys are 0. Its q, dout and dlse may be NaN, and 0 * NaN is
        # NaN, so zeros replace them before the products.
        empty = _without_keys(s, lse[:, :, rows, None], options)
        p = _weights(s, options).masked_fill_(empty, 0)
        do = dout[:, rows].transpose(1, 2).float().masked_fill(empty, 0)
        dp = (_by_group(do, Hk) @ v[:, :, keys].mT).view(p.shape)
        kept = p
        if options.dropout_p > 0:
            dropout = _dropout(q, rows, keys, options, first_batch)
            kept, dp = p * dropout, dp.mul_(dropout)
        if want_v:
            dv[:, :, keys] += _sum_by_group(kept, do, Hk)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True))
        if dlse is not None:
            ds += dlse[:, :, rows, None]
        ds = ds.mul_(p).masked_fill_(empty, 0)
        if want_mask:
            _add_mask_gradient(dmask, ds, rows, keys)
        if want_slopes:
            by_query[:, :, rows] = (ds * _distances(q, rows, keys, Tk, shift)).sum(-1)
        if cap is not None:
            ds = ds.mul_(cap).masked_fill_(empty, 0)
        ds = ds.mul_(options.softmax_scale)
        if want_q:
            product = _by_group(ds, Hk) @ k[:, :, keys]
            dq[:, rows] = product.view(B, H, -1, D).transpose(1, 2).to(dtype)
        if want_k:
            rows_q = q[:, rows].transpose(1, 2).float().masked_fill(empty, 0)
            dk[:, :, keys] += _sum_by_group(ds, rows_q, Hk)
    dk, dv = (
        d.transpose(1, 2).to(dtype).contiguous() if wanted else d.to(dtype)
        for d, wanted in ((dk, want_k), (dv, want_v))
    )
    return dq, dk, dv, dmask.to(dtype if mask is None else mask.dtype), by_query


def _weights(s: Tensor, options: AttentionOptions) -> Tensor:
    """Returns the softmax of the scores, and of the sinks. It is more accurate than exp(s - lse),
    which adds the rounding error of lse."""
    if options.sinks is None:
        return torch.softmax(s, -1)
    sinks = options.sinks[:, None, None].expand(*s.shape[:-1], 1)
    return torch.softmax(torch.cat((s, sinks), -1), -1)[..., :-1]


def _without_keys(s: Tensor, lse: Tensor, options: AttentionOptions) -> Tensor:
    """Returns which rows of s see no key."""
    empty = lse == -math.inf
    return empty if options.sinks is None else empty | (s.amax(-1, keepdim=True) == -math.inf)


def _distances(q: Tensor, rows: slice, keys: slice, Tk: int, shift: Tensor | None) -> Tensor:
    """Returns |position - key|, which broadcasts to (B, H, rows, keys)."""
    key = torch.arange(Tk, device=q.device)[keys]
    return (positions(rows, q.shape[1], Tk, q.device, shift) - key).abs()


def scores(
    q: Tensor,
    k: Tensor,
    rows: slice,
    keys: slice,
    options: AttentionOptions,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the scores (B, H, rows, keys) in fp32, -inf where hidden, and the derivative of the
    softcap, None without a softcap."""
    (B, Tq, H), (Hk, Tk) = q.shape[:3], k.shape[1:3]
    rows_q = _by_group(q[:, rows].transpose(1, 2).float(), Hk)
    s = (
        (rows_q @ k[:, :, keys].mT)
        .mul_(options.softmax_scale)
        .view(B, H, -1, keys.stop - keys.start)
    )
    cap = None
    if options.softcap > 0:
        t = torch.tanh(s / options.softcap)
        s, cap = options.softcap * t, 1 - t * t
    if options.alibi_slopes is not None:
        s -= options.alibi_slopes[..., None, None] * _distances(q, rows, keys, Tk, shift)
    if options.attn_mask is not None and options.attn_mask.dtype != torch.bool:
        s += mask_block(options.attn_mask, rows, keys)
    return s.masked_fill_(hidden_keys(options, rows, keys, Tq, Tk, q.device, shift), -math.inf), cap


def _by_group(x: Tensor, key_heads: int) -> Tensor:
    """Returns x (B, H, rows, n) as (B, Hk, H / Hk * rows, n): the query heads of one key head
    become more rows."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def _sum_by_group(x: Tensor, y: Tensor, key_heads: int) -> Tensor:
    """Returns x^T y, (B, Hk, keys, D), added up over the query heads of one key head.

    One product of all their rows would round more often: it adds up the rows one after another.
    """
    return (x.mT @ y).unflatten(1, (key_heads, -1)).sum(2)


def _dropout(
    q: Tensor, rows: slice, keys: slice, options: AttentionOptions, first_batch: int
) -> Tensor:
    """Returns dropout's factor of each weight: 0 where dropped, else 1 / the keep probability."""
    count = rows.stop - rows.start
    keep = masks.attention_keep(
        options.rng, options.dropout_p, q.shape[0], q.shape[2], count, keys.stop, rows.start,
        first_batch,
    )  # fmt: skip
    return keep[..., keys.start :] * philox.scale(options.dropout_p)


def _add_mask_gradient(dmask: Tensor, ds: Tensor, rows: slice, keys: slice) -> None:
    """Adds a block of dS to the mask's gradient, summed over the mask's broadcast dimensions."""
    target = mask_block(dmask, rows, keys)
    broadcast = [d for d in range(4) if target.shape[d] == 1 and ds.shape[d] != 1]
    if broadcast:
        ds = ds.sum(broadcast, keepdim=True)
    target += ds
