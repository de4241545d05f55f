"""GELU written out, as transformers' NewGELUActivation or minGPT's NewGELU: eight operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.dropin.probe import agrees
from gptkernels.dropin.swap import Fused, Match


class GELU(Fused):
    """PyTorch's operator in place of several."""

    what = "GELU as one operator of PyTorch"
    approximate: str

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> its shape."""
        if torch.compiler.is_compiling():  # Inductor fuses them
            return super().forward(x)
        return F.gelu(x, approximate=self.approximate)


def match(module: nn.Module) -> Match:
    """The kind and its facts; None where it is no GELU that is written out."""
    if "gelu" not in type(module).__name__.lower() or type(module) is nn.GELU:
        return None
    if module._parameters or module._buffers or module._modules:
        return None
    for approximate in ("tanh", "none"):
        if agrees(module, _formula, (5, 64), approximate=approximate):
            return GELU, {"approximate": approximate}
    return "it is another function than GELU, exact or by tanh"


def _formula(module: Any, x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)
