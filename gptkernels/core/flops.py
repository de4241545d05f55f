"""What PyTorch's FlopCounterMode counts for the registered ops.

It counts two for each multiplication and addition of a product, and nothing else; of attention
every score, also those that are masked, and five products in the backward pass. So do our formulas,
for numbers that compare with those of other models. An implementation may compute a product again,
or a gradient in the forward pass: a call with its gradients has the same number in all of them.

torch.utils.flop_counter imports Triton. Who uses it imports it, and gets the formulas then.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """From now on FlopCounterMode counts formula(*arguments) for a call of the op."""
    _formulas[op] = formula
    if _COUNTER in sys.modules:
        _add(sys.modules[_COUNTER], op)


def product(rows: int, inner: int, columns: int) -> int:
    """What a matrix product (rows, inner) x (inner, columns) takes."""
    return 2 * rows * inner * columns


def values(tensor: Tensor) -> list[int] | None:
    """The numbers of an integer tensor, for which a GPU is waited for; None where it has none."""
    if tensor.is_meta or torch._subclasses.fake_tensor.is_fake(tensor):
        return None
    found: list[int] = tensor.tolist()
    return found


def _add(counter: ModuleType, op: Any) -> None:
    def count(*arguments: Any, out_val: Any = None) -> int:
        return _formulas[op](*arguments)

    counter.flop_registry[op.overloadpacket] = count


class _WhenImported(MetaPathFinder):
    """Adds the formulas to the counter's module as soon as somebody imports it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                for op in _formulas:
                    _add(module, op)

            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
