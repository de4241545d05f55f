"""How a registered op runs inside vmap: in one call where it computes the entries of a batch apart
from each other, with the vmapped dimension as a part of that batch; else in a call for each slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Names the arguments whose first dimension is a batch of independent entries, as it is in every
# result; none where a call with these arguments has no such batch.
Entries = Callable[[Mapping[str, Any]], Sequence[str]]


def rule(op: Callable[..., Any], names: Sequence[str], entries: Entries) -> Callable[..., Any]:
    """Returns the rule of `op`, whose arguments have these names, for torch.library.register_vmap.
    Every result has the vmapped dimension first."""

    def run(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        given = dict(zip(names, arguments, strict=True))
        sliced = {
            name: given[name].movedim(dim, 0)
            for name, dim in zip(names, in_dims, strict=True)
            if isinstance(dim, int)
        }
        apart = entries(given | {name: tensor[0] for name, tensor in sliced.items()})
        if sliced.keys() <= set(apart):
            results = _at_once(op, given, sliced, apart, info.batch_size)
        else:
            results = _one_by_one(op, given, sliced, info.batch_size)
        return results, (0,) * len(results)

    return run


def _at_once(
    op: Callable[..., Any],
    given: dict[str, Any],
    sliced: dict[str, Tensor],
    apart: Sequence[str],
    slices: int,
) -> tuple[Tensor, ...]:
    for name in apart:
        if given[name] is not None:
            every = (
                sliced[name] if name in sliced else given[name].expand(slices, *given[name].shape)
            )
            given[name] = _readable(every.flatten(0, 1))
    # A result that is not wanted has no elements, and so none of a slice.
    return tuple(
        result.unflatten(0, (slices, result.shape[0] // slices)) for result in op(*given.values())
    )


def _one_by_one(
    op: Callable[..., Any], given: dict[str, Any], sliced: dict[str, Tensor], slices: int
) -> tuple[Tensor, ...]:
    results = (
        op(*(given | {name: _readable(every[i]) for name, every in sliced.items()}).values())
        for i in range(slices)
    )
    return tuple(torch.stack(slices_of_one) for slices_of_one in zip(*results, strict=True))


def _readable(tensor: Tensor) -> Tensor:
    """The tensor with a last stride of 1, as the kernels read it: inside vmap no check sees it."""
    return tensor if tensor.dim() == 0 or tensor.stride(-1) == 1 else tensor.contiguous()
