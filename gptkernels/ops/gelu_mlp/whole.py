"""The GELU MLP by functions that are no implementation of ours: they bring their own autograd, and
compute a call with and without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gptkernels.core.tuned import PYTORCH


def pytorch(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> Tensor:
    """y, by PyTorch's own operators. Unlike ours, they keep gelu(h) for the backward pass too."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


WHOLE = {PYTORCH: pytorch}


def takes(facts: Mapping[str, Any]) -> list[str]:
    """Those that have all that a class of calls asks for."""
    same = facts["autocast"] or facts["x"] == facts["weights"]
    return [PYTORCH] if same and not facts["recompute"] else []


def run(
    name: str,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
) -> Tensor:
    """y of the call by the function of this name."""
    return WHOLE[name](x, w1, b1, w2, b2, approximate)
