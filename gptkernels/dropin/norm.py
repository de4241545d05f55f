"""LayerNorm: nn.LayerNorm, and modules that apply F.layer_norm to a weight and a bias of their own
(nanoGPT's)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_enabled
from gptkernels.dropin.probe import agrees
from gptkernels.dropin.swap import Fused, Match
from gptkernels.ops.layer_norm.op import layer_norm

# With fewer numbers PyTorch's call takes less time than the op's, and in float32 with any
# (docs/cpu.md).
_LEAST_NUMBERS = 1 << 17
_NANOGPT_EPS = 1e-5


class LayerNorm(Fused):
    """A LayerNorm of the last dimension."""

    what = "LayerNorm as one op"
    epsilon: float | None  # None: the module's own .eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        # First what is asked of every token that is generated.
        if self.impl == "auto" and (x.dtype == torch.float32 or x.numel() < _LEAST_NUMBERS):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if (
            not self.fuses(x)
            or autocast_enabled(x)
            or weight.dtype != x.dtype
            or x.shape[-1:] != weight.shape
        ):
            return super().forward(x)
        eps = self.eps if self.epsilon is None else self.epsilon
        return cast("Tensor", layer_norm(x, weight, bias, eps=eps, impl=self.impl))


def match(module: nn.Module) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no LayerNorm."""
    if type(module) is nn.LayerNorm:
        if module.weight is None or len(module.normalized_shape) != 1:
            return "only a LayerNorm of the last dimension with a weight is fused"
        return LayerNorm, {"epsilon": None}
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if "norm" not in type(module).__name__.lower() or "weight" not in names:
        return None
    if not names <= {"weight", "bias"} or not hasattr(module, "bias") or module._modules:
        return None
    shape = cast("Tensor", module.weight).shape
    if len(shape) != 1:
        return None
    if not agrees(module, _formula, (4, *shape)):
        return "its forward is not that of a LayerNorm with an eps of 1e-5"
    return LayerNorm, {"epsilon": _NANOGPT_EPS}


def _formula(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, _NANOGPT_EPS)
