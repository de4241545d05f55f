"""Keys and values in pages, laid end to end for `attention_varlen`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.checks import check_is_tensor, dtype_name
from gptkernels.ops.attention.decode import check_pages


def gathered(name: str, paged: Tensor, cu_seqlens: Tensor, block_table: Tensor) -> Tensor:
    """The first tokens of each sequence, (total, Hk, D), of pages (N, page, Hk, D).

    cu_seqlens (B + 1,) says how many tokens each sequence has, block_table (B, pages) which pages
    they are in. Raises TypeError, ValueError.
    """
    if not isinstance(paged, Tensor) or paged.dim() != 4:
        shape = tuple(paged.shape) if isinstance(paged, Tensor) else type(paged).__name__
        raise ValueError(f"{name} must be pages (N, page, Hk, D) with a block_table, got {shape}")
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32:
        got = dtype_name(block_table.dtype) if isinstance(block_table, Tensor) else block_table
        raise TypeError(f"block_table must be an int32 tensor (B, pages), got {got}")
    check_is_tensor("cu_seqlens_k", cu_seqlens)
    lengths = cu_seqlens.diff()
    if block_table.dim() != 2 or len(block_table) != len(lengths):
        raise ValueError(
            f"block_table must have shape ({len(lengths)}, pages), got {tuple(block_table.shape)}"
        )
    page = paged.shape[1]
    # Reading the values on a GPU would synchronise once more.
    if paged.is_cpu and lengths.numel():
        longest, room = int(lengths.max()), block_table.shape[1] * page
        if longest > room:
            raise ValueError(
                f"block_table must have pages for the {longest} tokens of the longest sequence, "
                f"got pages for {room}"
            )
        check_pages(block_table, lengths, page, len(paged))
    sequence = torch.arange(len(lengths), device=paged.device).repeat_interleave(lengths)
    place = torch.arange(len(sequence), device=paged.device) - cu_seqlens[sequence]
    return paged[block_table[sequence, place // page], place % page]
