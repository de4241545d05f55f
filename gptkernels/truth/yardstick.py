"""How exact eager PyTorch can be: each operator adds up in fp32, and rounds its result once.

PyTorch's operators work so on a GPU. On a CPU some add up in the dtype of their tensors: in
bfloat16 a sum of ones stops to grow at 256. An implementation that calls the same operator makes
the same error, so that error must not be the yardstick's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map, tree_map_

_NARROW = (torch.bfloat16, torch.float16)


class FullSums(TorchDispatchMode):
    """A context in which PyTorch's operators for CPUs add up in fp32. Values are rounded where they
    are without it: each result has the same dtype."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own: Any = _LAYER_NORM.get(func)
        if own is not None and args[0].device.type == "cpu":
            return own(*args, **kwargs)
        results = func(*args, **kwargs)
        # A view and an operator in place add nothing up, and random numbers are drawn once.
        aliases = any(result.alias_info is not None for result in func._schema.returns)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if aliases or draws or not (tree_any(_is_narrow, args) and tree_any(_is_narrow, results)):
            return results
        wide = func(*tree_map(_wide, args), **tree_map(_wide, kwargs))
        tree_map_(lambda result, exact: _is_narrow(result) and result.copy_(exact), results, wide)
        return results


def _is_narrow(value: Any) -> bool:
    narrow = isinstance(value, Tensor) and value.dtype in _NARROW
    return narrow and value.device.type == "cpu"


def _wide(value: Any) -> Any:
    """Returns fp32 for a 16-bit tensor or dtype, anything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if _is_narrow(value) else value
    return torch.float32 if value in _NARROW else value


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y in x's dtype, mean and rstd in fp32, which PyTorch's operator rounds on a CPU."""
    y, mean, rstd = torch.native_layer_norm(_wide(x), shape, _wide(weight), _wide(bias), eps)
    return y.to(x.dtype), mean, rstd


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Returns dx, dweight and dbias, each in its tensor's dtype. The rows are centred, since
    PyTorch's operator loses digits of dx where a row's mean is large, in float32 too."""
    results = torch.ops.aten.native_layer_norm_backward(
        _wide(dy), _wide(x) - mean, shape, torch.zeros_like(mean), rstd, _wide(weight),
        _wide(bias), wanted,
    )  # fmt: skip
    return tuple(
        exact if exact is None or like is None else exact.to(like.dtype)
        for exact, like in zip(results, (x, weight, bias), strict=True)
    )


_LAYER_NORM = {
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.native_layer_norm_backward.default: _layer_norm_backward,
}
