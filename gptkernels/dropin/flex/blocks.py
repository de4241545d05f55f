"""Holds the blocks that a BlockMask lists to what its mask_mod says.

FlexAttention leaves out blocks that are not listed, and asks mask_mod nothing in those listed as
full. This package's ops read the mask alone, so both have to agree. Every mask that they know shows
a query an interval of keys, and intervals tell for whole blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def check(block_mask: BlockMask, first: Tensor, last: Tensor, Tk: int) -> None:
    """Raises NotImplementedError unless the listed blocks are those of a mask where query i of
    entry b sees the keys first[b, i] ... last[b, i], both (B or 1, Tq) in 0...Tk - 1; none where
    last is less."""
    rows, columns = block_mask.BLOCK_SIZE
    begins = torch.arange(0, Tk, columns, device=first.device)
    ends = (begins + columns).clamp(max=Tk) - 1
    first, last = first[..., None], last[..., None]
    touched = _by_rows((first <= ends) & (last >= begins) & (first <= last), rows)
    whole = ~_by_rows((first > begins) | (last < ends), rows)
    full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, touched)
    some = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, touched) | full
    if bool((touched[:, None] & ~some).any()):
        raise NotImplementedError(
            "block_mask leaves out blocks that its mask_mod shows: a mask by blocks is not known"
        )
    if bool((full & ~whole[:, None]).any()):
        raise NotImplementedError(
            "block_mask lists blocks as full that its mask_mod does not show whole: a mask by "
            "blocks is not known"
        )


def _by_rows(of_queries: Tensor, rows: int) -> Tensor:
    """Whether something holds for any query of a block: (B, Tq, n) -> (B, blocks, n)."""
    missing = -of_queries.shape[1] % rows
    padded = torch.nn.functional.pad(of_queries, (0, 0, 0, missing))
    return padded.unflatten(1, (-1, rows)).any(2)


def _listed(counts: Tensor | None, indices: Tensor | None, like: Tensor) -> Tensor:
    """Which blocks are listed, (B or 1, H or 1, rows, columns) bool."""
    if counts is None or indices is None:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    columns = like.shape[-1]
    counted = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    places = torch.where(counted, indices, columns).long()  # one more column for the others
    found = torch.zeros(*places.shape[:-1], columns + 1, dtype=torch.bool, device=like.device)
    return found.scatter_(-1, places, True)[..., :columns]
