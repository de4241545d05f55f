"""Linear layers: nn.Linear, and Conv1D of transformers, whose weight lies transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.core.few_rows import MOST_ROWS, TRANSPOSED_ROWS
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match, OneInput, few
from gptkernels.nn.linear import linear_of_few_rows
from gptkernels.nn.plain import original_class

_CONV1D = "transformers.pytorch_utils.Conv1D"


class Linear(OneInput):
    """A linear layer: by the CPU kernel where rows are few and nothing needs a gradient, as in
    generation."""

    what = "few rows (generation) by a kernel that reads the weights once"

    def fuses(self, x: Any) -> bool:
        """The quickest questions first: they are asked of every token that is generated."""
        if torch.is_grad_enabled() or not isinstance(x, Tensor):
            return False
        # PyTorch's product of one row in float32 is as fast as the kernel.
        if self._gptkernels.impl == "auto" and x.dtype == torch.float32 and _is_row(x):
            return False
        return super().fuses(x) and few(x, MOST_ROWS)

    def fused(self, x: Tensor) -> Tensor | None:
        """x (..., in) -> (..., out)."""
        impl, transposed = self._gptkernels.impl, self._gptkernels.transposed
        if impl == "auto" and loses(x, transposed):
            return None
        return linear_of_few_rows(x, weight(self, transposed), self.bias, impl)


def _is_row(x: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or x.is_nested) and x.numel() == x.shape[-1]


def loses(x: Tensor, transposed: bool) -> bool:
    """Whether x has few rows, and PyTorch's product takes less time than the kernel for them: for
    one row in float32, and for some numbers of rows where the weight is transposed."""
    if not few(x, MOST_ROWS) or x.dtype not in TRANSPOSED_ROWS:
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    if transposed:
        return rows not in TRANSPOSED_ROWS[x.dtype]
    return rows == 1 and x.dtype == torch.float32


def is_transposed(module: nn.Module) -> bool | None:
    """Whether the weight of a linear layer is (in, out); None where `module` is none."""
    kind = original_class(module)
    if kind is nn.Linear:
        return False
    if f"{kind.__module__}.{kind.__qualname__}" == _CONV1D:
        return True
    return None


def weight(module: Any, transposed: bool) -> Tensor:
    """The weight of a linear layer as (out, in), a view."""
    return module.weight.t() if transposed else module.weight


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; None where it is no linear layer."""
    transposed = is_transposed(module)
    return None if transposed is None else (Linear, {"transposed": transposed})
