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
# Large numbers too: a function may differ from GELU there.
_SCALES = (1.0, 50.0)
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Probe:
    """Runs modules, and remembers what it found: the layers of a model are alike. For one call of
    `accelerate`, during which the modules stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[Any, bool] = {}
        embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
        # That of positions may have as many rows as a block's inner layer has outputs.
        self._vocabulary = max((each.num_embeddings for each in embeddings), default=0)

    def is_vocabulary(self, classes: int) -> bool:
        """Whether the largest embedding of the model has so many rows."""
        return classes == self._vocabulary

    def agrees(
        self,
        module: nn.Module,
        formula: Callable[..., Tensor],
        shape: tuple[int, ...],
        attributes: dict[str, Any] | None = None,
        **facts: Any,
    ) -> bool:
        """Whether module(x) and formula(module, x, **facts) are equal, up to rounding, for random x
        of this shape, in training and in evaluation mode. Both get a copy of the module in fp64, on
        the CPU, without hooks, with random parameters and these attributes, in which every
        nn.Dropout leaves a mark on what it gets. False where the module cannot run so, or where its
        results are random."""
        key = (type(module), formula, shape, str(attributes), str(facts), _settings(module))
        if key not in self._found:
            wanted = functools.partial(formula, **facts)
            self._found[key] = _agrees(module, wanted, shape, attributes or {})
        return self._found[key]


class _Marker(nn.Module):
    """In place of a dropout: shows where in a forward it is."""

    def forward(self, x: Tensor) -> Tensor:
        """x times a factor for each column."""
        return x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)


def _settings(module: nn.Module) -> str:
    """What a module and its children hold: plain values, and which objects else."""
    said: list[Any] = []
    for name, child in module.named_modules():
        values = {k: v for k, v in vars(child).items() if k not in _OF_ANY_MODULE}
        plain = [
            (k, repr(v) if isinstance(v, int | float | str | None) else id(v))
            for k, v in values.items()
        ]
        sizes = [(k, tuple(p.shape)) for k, p in child.named_parameters(recurse=False)]
        buffers = [(k, id(b)) for k, b in child.named_buffers(recurse=False)]
        said.append((name, id(type(child)), plain, sizes, buffers))
    return str(said)


def _agrees(
    module: nn.Module,
    formula: Callable[..., Tensor],
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> bool:
    generator = torch.Generator().manual_seed(0)
    random = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    try:
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            twin = _twin(module, attributes)
            # Of a new model biases are 0, and norms have weights of 1.
            for parameter in twin.parameters():
                parameter.copy_(random(parameter.shape) / max(parameter.shape[-1:] or (1,)) ** 0.5)
            for training in (True, False):
                twin.train(training)
                for scale in _SCALES:
                    x = scale * random(shape)
                    wanted, found = type(twin).forward(twin, x), formula(twin, x)
                    if not _equal(wanted, found):
                        return False
    except Exception:  # whatever a stranger's code raises: it is not what it looked like
        return False
    return True


def _equal(wanted: Any, found: Tensor) -> bool:
    return (
        isinstance(wanted, Tensor)
        and wanted.shape == found.shape
        and bool((wanted - found).abs().max() <= _CLOSE * wanted.abs().max())
    )


def _twin(module: nn.Module, attributes: dict[str, Any]) -> nn.Module:
    """A copy with parameters that nobody has written yet."""
    fresh = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=torch.float64)) for p in module.parameters()
    }
    twin = copy.deepcopy(module, dict(fresh)).to("cpu", torch.float64)
    for child in list(twin.modules()):
        for name, value in vars(child).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                vars(child)[name] = 0.5  # that of a functional dropout may be 0 today
        for hooks in _HOOKS:
            getattr(child, hooks).clear()
        for name, dropout in child.named_children():
            if type(dropout) is nn.Dropout:
                setattr(child, name, _Marker())
    vars(twin).update(attributes)
    return twin
