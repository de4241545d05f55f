"""Whether a module computes what its parts suggest: it is run on random numbers in fp64.

A module of a class that this package does not know is recognised by its parts. What its forward
does with them is then compared with the formula; nothing is swapped on a guess.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CLOSE = 1e-9  # of the largest number: rounding in fp64, and constants written with ten digits
# What was found for modules of one class, sizes and settings: those of a model's layers are alike.
_FOUND: dict[Any, bool] = {}


def agrees(
    module: nn.Module, formula: Callable[..., Tensor], shape: tuple[int, ...], **facts: Any
) -> bool:
    """Whether module(x) and formula(module, x, **facts) are equal, up to rounding, for a random x
    of this shape. Both get a copy of the module, in fp64, on the CPU and in training mode, in which
    every nn.Dropout leaves a mark on what it gets. False where the module cannot run so, or where
    its results are random."""
    key = (type(module), formula, shape, str(facts), _settings(module))
    if key not in _FOUND:
        _FOUND[key] = _agrees(module, functools.partial(formula, **facts), shape)
    return _FOUND[key]


class _Marker(nn.Module):
    """In place of a dropout: shows where in a forward it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)


def _settings(module: nn.Module) -> str:
    """All numbers, words and functions that the module and its children hold, and their sizes."""
    said = []
    for name, child in module.named_modules():
        plain = {
            key: value
            for key, value in vars(child).items()
            if key != "training" and not key.startswith("_")
        }
        sizes = [(key, tuple(value.shape)) for key, value in child.named_parameters(recurse=False)]
        said.append((name, type(child), sorted(map(str, plain.items())), sizes))
    return str(said)


def _agrees(module: nn.Module, formula: Callable[..., Tensor], shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    try:
        twin = copy.deepcopy(module).to("cpu", torch.float64).train()
        for child in list(twin.modules()):
            for name, dropout in child.named_children():
                if type(dropout) is nn.Dropout:
                    setattr(child, name, _Marker())
            if isinstance(vars(child).get("dropout"), float):
                vars(child)["dropout"] = 0.0  # nanoGPT's, for PyTorch's attention
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # Random parameters: those of a new model have biases of 0 and weights of 1.
            for parameter in twin.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                    / parameter.shape[-1] ** 0.5
                )
            wanted, found = type(twin).forward(twin, x), formula(twin, x)
    except Exception:  # whatever a stranger's code raises: it is not what it looked like
        return False
    return (
        isinstance(wanted, Tensor)
        and wanted.shape == found.shape
        and bool((wanted - found).abs().max() <= _CLOSE * wanted.abs().max())
    )
