"""Padded batches as packed sequences, and back: flash_attn.bert_padding's functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.checks import check_shape
from gptkernels.flash_attn_interface.arguments import check_range


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows input[indices]: input (n, ...), indices (m,) int64 -> (m, ...). Differentiable in
    input; gradients of a row that is named twice add up, other than in flash-attn. Raises
    ValueError for a row that is not there, on a CPU."""
    check_range("indices", indices, len(input) - 1)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with the rows `values` (m, ...) at indices (m,) int64, which are
    distinct. Differentiable in values. Raises ValueError; for a wrong index on a CPU alone."""
    check_shape("indices", indices, tuple(values.shape[:1]), "the rows of values")
    check_range("indices", indices, first_axis_dim - 1)
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, laid end to end.

    Args:
        hidden_states: (B, T, ...).
        attention_mask: (B, T), bool or integers, nonzero where a token is.
        unused_mask: (B, T) likewise, nonzero where room is kept for a token that is not used.

    Returns:
        The tokens (total, ...) of either mask; their indices (total,) int64 in the flat batch;
        cu_seqlens (B + 1,) int32; the longest length, an int, for which the host waits; and
        seqused (B,) int32, how many of each entry's tokens are in attention_mask.

    Raises:
        TypeError, ValueError: A mask is no tensor, or has another shape.
    """
    _check_entries("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_entries("unused_mask", unused_mask, hidden_states)
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths, seqused = (mask.sum(-1, dtype=torch.int32) for mask in (kept, used))
    indices = kept.flatten().nonzero().flatten()
    return (*_packed(hidden_states, indices, lengths), seqused)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a padded batch whose entries hold several sequences each, laid end to end.

    Args:
        hidden_states: (B, T, ...).
        attention_mask_in_length: (B, T) integers. An entry's row begins with the lengths of its
            sequences, which follow one another from its first token on; zeros fill the row.

    Returns:
        As `unpad_input`, without the last; cu_seqlens has one sequence for each nonzero length.

    Raises:
        ValueError: attention_mask_in_length has another shape, or, on a CPU, a row of more than T
            tokens.
    """
    _check_entries("attention_mask_in_length", attention_mask_in_length, hidden_states)
    T = attention_mask_in_length.shape[-1]
    total = attention_mask_in_length.sum(-1, keepdim=True)
    check_range("the sums of attention_mask_in_length", total[:, 0], T)
    indices = (torch.arange(T, device=total.device) < total).flatten().nonzero().flatten()
    flat = attention_mask_in_length.flatten()
    return _packed(hidden_states, indices, flat[flat.nonzero().flatten()])


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens (total, ...) as a padded batch (batch, seqlen, ...), zeros where no token is. indices
    (total,) int64 are those of `unpad_input`. Differentiable in hidden_states. Raises as
    `index_put_first_axis`."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _check_entries(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    check_shape(name, mask, tuple(hidden_states.shape[:2]), "batch and tokens of hidden_states")


def _packed(
    hidden_states: Tensor, indices: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest
