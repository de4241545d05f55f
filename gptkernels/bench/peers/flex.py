"""Compiled FlexAttention, in the layout of our ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gptkernels.bench.peers import Function, Shape
from gptkernels.bench.peers.compiled import compiled

# Of batch entry, head, query and key; the former of a score before them.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def function(
    device: torch.device,
    q_shape: Shape,
    k_shape: Shape,
    *,
    seen: Seen | None,
    score: Score | None = None,
    by_entry: bool = False,
    backward: bool,
) -> Function:
    """A function of q (B, Tq, H, D), k and v (B, Tk, Hk, D). `seen` says which keys a query sees,
    for all batch entries alike unless `by_entry`; None: all."""
    if backward and device.type == "cpu":
        raise NotImplementedError("PyTorch has no backward pass of FlexAttention on a CPU")
    (B, Tq, H, _), (_, Tk, Hk, _) = q_shape, k_shape
    options: dict[str, Any] = {"score_mod": score, "enable_gqa": Hk != H}
    if seen is not None:
        entries = B if by_entry else None
        options["block_mask"] = create_block_mask(seen, entries, None, Tq, Tk, device=str(device))
    attention = compiled(flex_attention)

    def flex(*tensors: Tensor) -> Any:
        return attention(*(x.transpose(1, 2) for x in tensors), **options).transpose(1, 2)

    return flex
