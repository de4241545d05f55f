"""How the ops that multiply matrices follow torch.autocast: as F.linear does, but from outside."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast converts x to; x's own where it is off for x's device."""
    if _enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside an op PyTorch's functions keep the op's dtypes, also in a backward pass under
    autocast."""
    if _enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _enabled(x: Tensor) -> bool:
    # PyTorch raises where it is asked about "meta", whose tensors hold nothing to convert.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
