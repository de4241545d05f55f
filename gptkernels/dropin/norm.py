"""LayerNorm: nn.LayerNorm, and modules that apply F.layer_norm to a weight and a bias of their own
(nanoGPT's)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_enabled
from gptkernels.dropin.probe import agrees
from gptkernels.dropin.swap import Fused, few
from gptkernels.ops.layer_norm.op import layer_norm

# Up to so many rows PyTorch's call takes less time than the op's (docs/cpu.md).
_FEW_ROWS = 128
_NANOGPT_EPS = 1e-5


class LayerNorm(Fused, nn.Module):
    """A LayerNorm of the last dimension."""

    what = "LayerNorm as one op"
    epsilon: float | None  # None: the module's own .eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        weight, bias = self.weight, self.bias
        if (
            not self.fuses(x)
            or autocast_enabled(x)
            or weight.dtype != x.dtype
            or x.shape[-1:] != weight.shape
            or (self.impl == "auto" and few(x, _FEW_ROWS))
        ):
            return super().forward(x)
        eps = self.eps if self.epsilon is None else self.epsilon
        return layer_norm(x, weight, bias, eps=eps, impl=self.impl)


def match(module: nn.Module) -> tuple[type[Fused], dict[str, Any]] | str | None:
    """The kind and its facts; or why the module is left alone; None where it is no LayerNorm."""
    if type(module) is nn.LayerNorm:
        if module.weight is None or len(module.normalized_shape) != 1:
            return "only a LayerNorm of the last dimension with a weight is fused"
        return LayerNorm, {"epsilon": None}
    names = set(module._parameters)
    if "norm" not in type(module).__name__.lower() or names != {"weight", "bias"}:
        return None
    if list(module.children()) or module.weight.dim() != 1:
        return None
    if not agrees(module, _formula, (4, *module.weight.shape)):
        return "its forward is not that of a LayerNorm with an eps of 1e-5"
    return LayerNorm, {"epsilon": _NANOGPT_EPS}


def _formula(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, _NANOGPT_EPS)
