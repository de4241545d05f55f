"""Blocks of query rows, and what each row sees: causal, windows, lengths and boolean masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptkernels.ops.attention.options import AttentionOptions

# The most scores that the formula holds at a time, and the most elements of a mask for the fused
# op. It limits the size of a block of query rows.
_SCORES_HELD = 2**24


def row_blocks(scores_per_row: int, Tq: int, most: int | None = None) -> Iterator[slice]:
    """Returns blocks of query rows, each with at most `most` rows and `_SCORES_HELD` scores."""
    if one_block(scores_per_row, Tq, most):  # for any Tq that torch.compile leaves open
        return iter((slice(0, Tq),))
    step = max(1, min(most or Tq, _SCORES_HELD // scores_per_row))
    return (slice(first, min(first + step, Tq)) for first in range(0, Tq, step))


def one_block(scores_per_row: int, Tq: int, most: int | None = None) -> bool:
    """Whether all query rows are one block of `row_blocks`."""
    return Tq <= (most or Tq) and Tq * scores_per_row <= _SCORES_HELD


def seen_keys(
    options: AttentionOptions, rows: slice, Tq: int, Tk: int, shift: Tensor | None = None
) -> slice:
    """Returns the range of keys that at least one of these rows sees, by causal and window; all
    keys with shift, whose values the host does not read."""
    if shift is not None:
        return slice(0, Tk)
    left, right = options.left, options.right
    low = max(0, rows.start + Tk - Tq - left) if left >= 0 else 0
    high = min(Tk, rows.stop + Tk - Tq + right) if right >= 0 else Tk
    return slice(min(low, Tk), max(low, high))


def positions(rows: slice, Tq: int, Tk: int, device: torch.device, shift: Tensor | None) -> Tensor:
    """Returns the position among the keys of each query, (rows, 1); with shift (B, 1, rows, 1)."""
    position = torch.arange(Tq, device=device)[rows, None] + Tk - Tq
    return position if shift is None else position + shift.view(-1, 1, 1, 1)


def hidden_keys(
    options: AttentionOptions,
    rows: slice,
    keys: slice,
    Tq: int,
    Tk: int,
    device: torch.device,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns True where anything but an additive mask hides the key from the query. Broadcasts to
    (B, H, rows, keys)."""
    position = positions(rows, Tq, Tk, device, shift)
    key = torch.arange(Tk, device=device)[keys]
    hidden = torch.zeros((1, 1), dtype=torch.bool, device=device)
    if options.left >= 0:
        hidden = hidden | (key < position - options.left)
    if options.right >= 0:
        hidden = hidden | (key > position + options.right)
    if options.key_lengths is not None:
        hidden = hidden | (key >= options.key_lengths.view(-1, 1, 1, 1))
    if options.attn_mask is not None and options.attn_mask.dtype == torch.bool:
        hidden = hidden | ~mask_block(options.attn_mask, rows, keys)
    return hidden


def mask_block(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    """Returns a view, with 4 dimensions, of these rows and keys of a mask that broadcasts to
    (B, H, Tq, Tk)."""
    mask = mask[(None,) * (4 - mask.dim())]
    every = slice(None)
    return mask[:, :, rows if mask.shape[2] > 1 else every, keys if mask.shape[3] > 1 else every]


def living_keys(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Returns x (B, H, T, D) with zeros past the lengths: what lies there may be NaN, and 0 * NaN
    is NaN."""
    if key_lengths is None:
        return x
    dead = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(dead[:, None, :, None], 0)
