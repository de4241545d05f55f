"""Attention of packed sequences.

On a CPU the sequences run one after the other, so a sequence's bits do not depend on the others. On
other devices reading the lengths would wait for the device, so a block of sequences runs at once,
padded to the longest length that the caller gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions, without_keys
from gptkernels.ops.attention.torch import dense as one

# The most elements of padded queries, and of padded keys, in memory at a time.
_PADDED = 2**26


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Returns out (1, total_q, H, D) and lse (1, H, total_q) in fp32; the formula is that of
    `gptkernels.truth.reference.attention_varlen`."""
    if q.device.type != "cpu":
        return _fwd_at_once(q, k, v, options)
    # torch.compile checks no lengths, so some queries may belong to no sequence: out is 0.
    out, lse = without_keys(q, v, options._replace(sinks=None))
    for b, rows, keys in _sequences(options):
        out[:, rows], lse[:, :, rows] = one.attention_fwd(
            q[:, rows], k[:, keys], v[:, keys], _of(options, b, b + 1), b
        )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, and by_query, each empty where `grad_mask` is False; the fourth
    tensor, the mask's gradient, is always empty."""
    if q.device.type != "cpu":
        return _bwd_at_once(dout, dlse, q, k, v, out, lse, options, grad_mask, deterministic)
    dq, dk, dv, by_query = (
        torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v, lse), (*grad_mask[:3], grad_mask[4]), strict=True)
    )
    for b, rows, keys in _sequences(options):
        *parts, _, by_row = one.attention_bwd(
            dout[:, rows], None if dlse is None else dlse[:, :, rows], q[:, rows], k[:, keys],
            v[:, keys], out[:, rows], lse[:, :, rows].contiguous(),
            _of(options, b, b + 1), grad_mask, deterministic, b,
        )  # fmt: skip
        for gradient, part, place, wanted in zip(
            (dq, dk, dv), parts, (rows, keys, keys), grad_mask, strict=False
        ):
            if wanted:
                gradient[:, place] = part
        if grad_mask[4]:
            by_query[:, :, rows] = by_row
    return dq, dk, dv, q.new_empty(0), by_query


def _of(options: AttentionOptions, first: int, last: int) -> AttentionOptions:
    """Returns the options for sequences first ... last - 1, each as a batch entry."""
    return options.entries(first, last)._replace(cu_seqlens_q=None, cu_seqlens_k=None)


def _sequences(options: AttentionOptions) -> Iterator[tuple[int, slice, slice]]:
    """Yields (number, queries, keys) of each sequence that has queries or keys."""
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    ends = zip(options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist(), strict=True)
    for b, ((q0, k0), (q1, k1)) in enumerate(itertools.pairwise(ends)):
        if q1 > q0 or k1 > k0:
            yield b, slice(q0, q1), slice(k0, k1)


# ---- a block of sequences at once


class _Padded(NamedTuple):
    """Where the tokens of a few sequences lie among all tokens, padded to one length."""

    token: Tensor  # (sequences, length): a token's number; the number of all tokens in the padding
    lengths: Tensor  # (sequences,) int32

    def padded(self, x: Tensor) -> Tensor:
        """Returns (sequences, length, ...) of x (1, tokens, ...), zeros in the padding."""
        inside = self.token < x.shape[1]
        shape = (*inside.shape, *[1] * (x.dim() - 2))
        return torch.where(inside.view(shape), x[0, self.token.clamp(max=x.shape[1] - 1)], 0)

    def unpadded(self, part: Tensor, x: Tensor) -> None:
        """Fills x (1, tokens + 1, ...) with part (sequences, length, ...). The last place of x
        takes the padding."""
        x[0].index_put_((self.token,), part)


def _pad(ends: Tensor, few: slice, total: int, longest: int) -> _Padded:
    """Returns the places of a block of sequences. Values out of range are clamped, as the kernels
    do it, since the host does not read them."""
    ends = ends.clamp(0, total)
    start = ends[:-1][few]
    lengths = (ends[1:][few] - start).clamp(0, longest)
    place = torch.arange(longest, device=ends.device)
    token = torch.where(place < lengths[:, None], start[:, None] + place, total)
    return _Padded(token, lengths)


class _Block(NamedTuple):
    """A block of sequences, and what `dense` takes for it."""

    first: int  # the number of the first sequence
    queries: _Padded
    keys: _Padded
    options: AttentionOptions
    shift: Tensor


def _blocks(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Iterator[_Block]:
    assert options.cu_seqlens_q is not None
    assert options.cu_seqlens_k is not None
    (total_q, H, D), (total_k, Hk) = q.shape[1:], k.shape[1:3]
    Tq, Tk = min(options.max_seqlen_q, total_q), min(options.max_seqlen_k, total_k)
    if Tq <= 0 or Tk <= 0 or H == 0:
        return
    step = max(1, _PADDED // (max(Tq * H, Tk * Hk) * max(D, v.shape[-1])))
    for first in range(0, options.cu_seqlens_q.shape[0] - 1, step):
        few = slice(first, first + step)
        queries = _pad(options.cu_seqlens_q, few, total_q, Tq)
        keys = _pad(options.cu_seqlens_k, few, total_k, Tk)
        # Queries and keys are aligned at the ends of their sequence, not of the padding.
        shift = keys.lengths - queries.lengths - (Tk - Tq)
        of_block = _of(options, first, first + step)._replace(key_lengths=keys.lengths)
        yield _Block(first, queries, keys, of_block, shift)


def _fwd_at_once(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    _, total, H, _ = q.shape
    if min(k.shape[1], options.max_seqlen_k) <= 0:
        return without_keys(q, v, options)
    out = torch.zeros((1, total + 1, H, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.full((1, total + 1, H), -math.inf, dtype=torch.float32, device=q.device)
    for block in _blocks(q, k, v, options):
        by_key = block.keys.padded
        part, part_lse = one.attention_fwd(
            block.queries.padded(q), by_key(k), by_key(v), block.options, block.first, block.shift
        )
        block.queries.unpadded(part, out)
        block.queries.unpadded(part_lse.transpose(1, 2), lse)
    return out[:, :total], lse[:, :total].transpose(1, 2).contiguous()


def _bwd_at_once(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    grad_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_token = lse.transpose(1, 2)  # (1, total_q, H), as by_query is until its end
    wanted_ones = (*grad_mask[:3], grad_mask[4])
    gradients = [
        x.new_zeros((1, x.shape[1] + 1, *x.shape[2:])) if wanted else x.new_empty(0)
        for x, wanted in zip((q, k, v, by_token), wanted_ones, strict=True)
    ]
    for block in _blocks(q, k, v, options):
        by_query, by_key = block.queries.padded, block.keys.padded
        # lse -inf marks rows without keys, which pass no gradient on; so it has to mark padding.
        inside = block.queries.token < q.shape[1]
        part_lse = by_query(lse.transpose(1, 2)).masked_fill(~inside[..., None], -math.inf)
        part_dlse = None if dlse is None else by_query(dlse.transpose(1, 2)).transpose(1, 2)
        *parts, _, by_row = one.attention_bwd(
            by_query(dout), part_dlse, by_query(q), by_key(k), by_key(v), by_query(out),
            part_lse.transpose(1, 2), block.options, grad_mask, deterministic, block.first,
            block.shift,
        )  # fmt: skip
        parts.append(by_row.transpose(1, 2) if grad_mask[4] else by_row)
        places = (block.queries, block.keys, block.keys, block.queries)
        for x, part, place, wanted in zip(gradients, parts, places, wanted_ones, strict=True):
            if wanted:
                place.unpadded(part, x)
    dq, dk, dv, rows = (
        x[:, :-1] if wanted else x for x, wanted in zip(gradients, wanted_ones, strict=True)
    )
    return dq, dk, dv, q.new_empty(0), rows.transpose(1, 2).contiguous() if grad_mask[4] else rows
