"""Linear layers: nn.Linear, and Conv1D of transformers, whose weight lies transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.core.few_rows import MOST_ROWS, TRANSPOSED_ROWS
from gptkernels.dropin.swap import Fused, Match, few
from gptkernels.nn.linear import linear_of_few_rows
from gptkernels.nn.plain import original_class

_CONV1D = "transformers.pytorch_utils.Conv1D"


class Linear(Fused):
    """A linear layer: by the CPU kernel where rows are few and nothing needs a gradient, as in
    generation."""

    what = "few rows (generation) by a kernel that reads the weights once"
    transposed: bool  # the weight is (in, out)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_grad_enabled() or not few(x, MOST_ROWS) or loses(x, self.transposed):
            return super().forward(x)
        w = self.weight.t() if self.transposed else self.weight
        y = linear_of_few_rows(x, w, self.bias, self.impl)
        return super().forward(x) if y is None else y


def loses(x: Tensor, transposed: bool) -> bool:
    """Whether x has few rows, and PyTorch's product with a transposed weight takes less time than
    the kernel for them."""
    if not transposed or not few(x, MOST_ROWS) or x.dtype not in TRANSPOSED_ROWS:
        return False
    return x.numel() // x.shape[-1] not in TRANSPOSED_ROWS[x.dtype]


def transposed(module: nn.Module) -> bool | None:
    """Whether the weight of a linear layer is (in, out); None where `module` is none."""
    kind = original_class(module)
    if kind is nn.Linear:
        return False
    if f"{kind.__module__}.{kind.__qualname__}" == _CONV1D:
        return True
    return None


def weight_of(module: Any) -> Tensor:
    """The weight of a linear layer as (out, in), a view."""
    return module.weight.t() if transposed(module) else module.weight


def match(module: nn.Module) -> Match:
    """The kind and its facts; None where it is no linear layer."""
    across = transposed(module)
    if across is None:
        return None
    return Linear, {"transposed": across}
