"""GELU written out, as transformers' NewGELUActivation or minGPT's NewGELU: eight operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match, OneInput


class GELU(OneInput):
    """PyTorch's operator in place of several."""

    what = "GELU as one operator of PyTorch"

    def fuses(self, x: Any) -> bool:
        """Inductor fuses the several by itself; on a GPU nothing was measured."""
        swap = self._gptkernels
        if torch.compiler.is_compiling() or swap.original.forward is not swap.forward:
            return False
        return type(x) in (Tensor, nn.Parameter) and (swap.impl != "auto" or x.is_cpu)

    def fused(self, x: Tensor) -> Tensor:
        """x of any shape -> its shape."""
        return F.gelu(x, approximate=self._gptkernels.approximate)


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; None where it is no GELU that is written out."""
    if "gelu" not in type(module).__name__.lower() or type(module) is nn.GELU:
        return None
    if module._parameters or module._buffers or module._modules:
        return None
    for approximate in ("tanh", "none"):
        if probe.agrees(module, _formula, (5, 64), approximate=approximate):
            return GELU, {"approximate": approximate}
    return "it is another function than GELU, exact or by tanh"


def _formula(module: Any, x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)
