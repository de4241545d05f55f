"""Models whose every parameter matters: a fresh one has biases of 0 and norms' weights of 1, and
gives all tokens nearly the same probability."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def shaken(model: Model, by: float = 0.2, generator: torch.Generator | None = None) -> Model:
    """The model itself, with normal noise of this size added."""
    for parameter in model.parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def sharpened(model: Model, times: float) -> Model:
    """The model itself, with parameters that are so many times as large."""
    for parameter in model.parameters():
        parameter.mul_(times)
    return model
