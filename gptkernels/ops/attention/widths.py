"""Values of another width than queries and keys, for kernels that know one width.

Zeros after the last column of q and k change no score, and zeros after the last column of v become
columns of out that are cut off. So the narrower tensors are padded, and results are cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def widened(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors with zeros up to the last dimension of the widest one."""
    widest = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == widest else F.pad(x, (0, widest - x.shape[-1])) for x in tensors]


def forward(launch: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Decorates the launcher of a forward pass (q, k, v, ...) that takes one width."""

    @functools.wraps(launch)
    def of_any_width(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Any:
        if v.shape[-1] == q.shape[-1]:
            return launch(q, k, v, *others, **options)
        out, lse = launch(*widened(q, k, v), *others, **options)
        return out[..., : v.shape[-1]].contiguous(), lse

    return of_any_width


def backward(launch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorates the launcher of a backward pass (dout, dlse, q, k, v, out, ...) that takes one
    width. Gradients that are not wanted have one dimension, without elements."""

    @functools.wraps(launch)
    def of_any_width(
        dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *others: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        if v.shape[-1] == q.shape[-1]:
            return launch(dout, dlse, q, k, v, out, *others, **options)
        dout, *qkv, out = widened(dout, q, k, v, out)
        *gradients, mask, by_query = launch(dout, dlse, *qkv, out, *others, **options)
        cut = (
            x[..., : given.shape[-1]].contiguous() if x.dim() == given.dim() else x
            for x, given in zip(gradients, (q, k, v), strict=True)
        )
        return (*cut, mask, by_query)

    return of_any_width
