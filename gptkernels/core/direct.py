"""Whether a call may go past PyTorch's dispatcher, which takes longer than a small kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# What an argument of a registered op may be. Another class of tensor could handle the call itself,
# and a SymInt comes from a compiler.
_TENSORS = frozenset((Tensor, Parameter))
_OTHERS = frozenset((type(None), bool, int, float, str, list, torch.dtype, torch.device))
_C = torch._C


def direct(arguments: Iterable[Any]) -> bool:
    """Whether nothing watches PyTorch's calls with these arguments: no compiler or tracer, no mode,
    no transform of torch.func, no level of forward-mode AD, no profiler, and no tensor of another
    class than PyTorch's own two, or one that the dispatcher would first write out."""
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _C._autograd._profiler_enabled()
        or _C._get_tracing_state() is not None
    ):
        return False
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            # The memory holds the negative values, or there is none, and all values are zero.
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif kind not in _OTHERS:
            return False
    return True
