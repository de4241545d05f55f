"""LayerNorm by functions that are no implementation of ours: they bring their own autograd, and
compute a call with and without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptkernels.core.tuned import EXTERNAL, PYTORCH
from gptkernels.ops.layer_norm import external


def pytorch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y and s, by PyTorch's own operators."""
    s = x if residual is None else (x + residual).contiguous()
    return torch.layer_norm(s, x.shape[-1:], weight, bias, eps), s


def takes(facts: Mapping[str, Any]) -> list[str]:
    """Those that have all that a class of calls asks for."""
    dtype, residual, weights = facts["dtype"], facts["residual"], facts["weights"]
    mixed = facts["device"] == "cpu" and weights == "float32"  # a CPU takes 16-bit rows with them
    same = weights in (dtype, "none") or mixed
    plain = not facts["dropout"] and residual in (dtype, "none") and not facts["autocast"]
    wide = facts["wide"] and dtype != "float32"
    own = same and plain and not wide
    return [*([PYTORCH] if own else []), *(EXTERNAL + name for name in external.takes(facts))]


def run(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y and s of the call by the function of this name, which takes it."""
    if name == PYTORCH:
        return pytorch(x, weight, bias, residual, eps)
    return external.run(name.removeprefix(EXTERNAL), x, weight, bias, residual, eps)
