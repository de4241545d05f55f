"""The functions of FlashAttention-2, -3 and -4."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from gptkernels.bench.peers import Function
from gptkernels.bench.peers.packages import load, need_gpu, need_half


def function(
    name: str, attribute: str, device: torch.device, dtype: torch.dtype, **options: Any
) -> Function:
    """A function of a FlashAttention with these options, which returns the output alone."""
    module = load(name)
    need_gpu(device, name)
    need_half(dtype, name)
    attention = getattr(module, attribute, None)
    if attention is None:
        raise NotImplementedError(f"this release of {name} has no {attribute}")
    unknown = options.keys() - inspect.signature(attention).parameters.keys()
    if unknown:
        raise NotImplementedError(f"{attribute} of {name} has no {', '.join(sorted(unknown))}")

    def out(*tensors: Any) -> Any:
        result = attention(*tensors, **options)
        return result[0] if isinstance(result, tuple) else result

    return out
