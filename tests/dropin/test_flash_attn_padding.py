"""flash_attn_interface: padded batches as packed sequences, and back."""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE
from op_inputs import draw

from gptkernels.flash_attn_interface import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_there_and_back() -> None:
    """Tokens keep their places, padding becomes 0, and gradients of padding are 0."""
    mask = torch.tensor(MASK, device=DEVICE)
    x = draw(3, 5, 2, 4).requires_grad_()
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert indices.tolist() == [1, 2, 4, 10, 11, 12, 13, 14]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 3, 3, 8], torch.int32)
    assert (longest, type(longest)) == (5, int)
    assert (seqused.tolist(), seqused.dtype) == ([3, 0, 5], torch.int32)
    back = pad_input(tokens, indices, 3, 5)
    kept = mask[..., None, None]
    assert torch.equal(back, x * kept)
    weights = draw(3, 5, 2, 4)
    (back * weights).sum().backward()
    assert torch.equal(x.grad, weights * kept)


def test_masks_are_bool_or_integers() -> None:
    x = draw(3, 5, 4)
    for mask in (torch.tensor(MASK, device=DEVICE), torch.tensor(MASK, device=DEVICE) > 0):
        assert unpad_input(x, mask)[2].tolist() == [0, 3, 3, 8]


def test_room_that_is_kept_is_no_token() -> None:
    used = torch.tensor(MASK, device=DEVICE)
    unused = torch.zeros_like(used)
    unused[0, 0] = unused[1, 2] = 1
    tokens, indices, cu_seqlens, longest, seqused = unpad_input(draw(3, 5, 4), used, unused)
    assert indices.tolist() == [0, 1, 2, 4, 7, 10, 11, 12, 13, 14]
    assert (cu_seqlens.tolist(), longest, len(tokens)) == ([0, 4, 5, 10], 5, 10)
    assert seqused.tolist() == [3, 0, 5]


def test_several_sequences_in_an_entry() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]], device=DEVICE)
    x = draw(3, 6, 4)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, 17]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 5, 11], torch.int32, 6)
    assert torch.equal(pad_input(tokens, indices, 3, 6)[2], x[2])


def test_rows_by_their_numbers() -> None:
    x, numbers = draw(6, 3).requires_grad_(), torch.tensor([4, 0, 4], device=DEVICE)
    picked = index_first_axis(x, numbers)
    assert torch.equal(picked, x[numbers])
    picked.sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 0, 0, 2, 0]
    values = draw(2, 3).requires_grad_()
    put = index_put_first_axis(values, numbers[:2], 6)
    assert torch.equal(put[numbers[:2]], values)
    assert not put[[1, 2, 3, 5]].any()
    (put * put.detach()).sum().backward()
    assert torch.equal(values.grad, values.detach())


def test_what_does_not_fit_is_refused() -> None:
    """Each of these gave rows of other tokens, or an error of PyTorch's that names no argument."""
    x, mask = draw(3, 5, 4), torch.tensor(MASK, device=DEVICE)
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor, got NoneType"):
        unpad_input(x, None)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 5\)"):
        unpad_input(x, mask[:2])
    with pytest.raises(ValueError, match=r"unused_mask must have shape \(3, 5\)"):
        unpad_input(x, mask, mask[:, :1])
    with pytest.raises(ValueError, match=r"attention_mask_in_length must have shape \(3, 5\)"):
        unpad_input_for_concatenated_sequences(x, mask[:2])
    with pytest.raises(ValueError, match=r"sums of attention_mask_in_length must .*, got 9 for"):
        unpad_input_for_concatenated_sequences(x, 3 * mask)
    tokens, indices, *_ = unpad_input(x, mask)
    with pytest.raises(ValueError, match=r"indices must have shape \(8,\)"):
        pad_input(tokens, indices[:-1], 3, 5)
    with pytest.raises(ValueError, match=r"indices must lie between 0 and 9, got 10 for entry 3"):
        pad_input(tokens, indices, 2, 5)
    with pytest.raises(ValueError, match="indices must lie between 0 and 7, got 10 for entry 3"):
        index_first_axis(tokens, indices)
