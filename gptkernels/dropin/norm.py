"""LayerNorm: nn.LayerNorm, and modules that apply F.layer_norm to a weight and a bias of their own
(nanoGPT's)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_enabled
from gptkernels.dropin import measured
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match, OneInput
from gptkernels.ops.layer_norm.op import layer_norm

# With fewer numbers PyTorch's call takes less time than the op's, and in float32 with any
# (docs/dropin.md).
_LEAST_NUMBERS = 1 << 17
_NANOGPT_EPS = 1e-5


class LayerNorm(OneInput):
    """A LayerNorm of the last dimension."""

    what = "LayerNorm as one op"

    def fuses(self, x: Any) -> bool:
        """Asked for every token that is generated: the quickest question first."""
        if self._gptkernels.impl == "auto" and type(x) is Tensor:
            if measured.asked(x):
                return self.fits(x)  # the table says the rest
            if _is_pytorchs(x):
                return False
        return super().fuses(x)

    def fused(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> (..., C)."""
        weight, bias = self.weight, self.bias
        if autocast_enabled(x) or weight.dtype != x.dtype or x.shape[-1:] != weight.shape:
            return None
        known, impl = self._gptkernels.eps, self._gptkernels.impl
        eps = self.eps if known is None else known
        if impl == "auto":
            runs = measured.layer_norm(x, weight, bias, eps)
            if runs is False or (runs is None and (_is_pytorchs(x) or not super().fuses(x))):
                return None
        return cast("Tensor", layer_norm(x, weight, bias, eps=eps, impl=impl))


def _is_pytorchs(x: Tensor) -> bool:
    """Whether PyTorch's call takes less time, where nothing was measured here."""
    if torch.compiler.is_compiling():  # a question about sizes would be one that the graph asks
        return False
    return x.dtype == torch.float32 or x.numel() < _LEAST_NUMBERS


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no LayerNorm."""
    if type(module) is nn.LayerNorm:
        if module.weight is None or len(module.normalized_shape) != 1:
            return "only a LayerNorm of the last dimension with a weight is fused"
        return LayerNorm, {"eps": None}  # its own, which may be changed
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if "norm" not in type(module).__name__.lower() or "weight" not in names:
        return None
    if not names <= {"weight", "bias"} or not hasattr(module, "bias") or module._modules:
        return None
    shape = cast("Tensor", module.weight).shape
    if len(shape) != 1:
        return None
    if not probe.agrees(module, _formula, (2, 5 if shape[0] != 5 else 7, *shape)):
        return "its forward is not that of a LayerNorm with an eps of 1e-5"
    return LayerNorm, {"eps": _NANOGPT_EPS}


def _formula(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, _NANOGPT_EPS)
