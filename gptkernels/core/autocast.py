"""How the ops that multiply matrices follow torch.autocast. They convert their inputs themselves,
to the dtype that F.linear would take."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that autocast converts x to, or x's own where autocast is off for x's
    device."""
    if autocast_enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that turns autocast off for x's device. An op runs in it, so that PyTorch's
    functions keep the op's dtypes, also in a backward pass under autocast."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    if x.is_cpu:  # to ask a tensor for its device's name takes longer than all this
        return torch.is_autocast_enabled("cpu")
    # PyTorch raises an error if asked about autocast on "meta". Meta tensors hold nothing to
    # convert.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
