"""LayerNorm by another package: Liger, with its own autograd. It has the norm alone, so PyTorch
adds the residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptkernels.core import externals

LIGER = "liger"


def takes(facts: Mapping[str, Any]) -> list[str]:
    """The names of the installed ones that have all that a class of calls asks for."""
    dtype, residual = facts["dtype"], facts["residual"]
    same = facts["weights"] == dtype and facts["bias"] and residual in (dtype, "none")
    plain = not facts["dropout"] and not facts["autocast"]
    wide = facts["wide"] and dtype != "float32"
    if facts["device"] != "cuda" or not same or not plain or wide:
        return []
    return [LIGER] if externals.is_installed(LIGER) else []


def run(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y and s, by a package's function. Raises whatever that does."""
    s = x if residual is None else x + residual
    return externals.load(name).LigerLayerNormFunction.apply(s, weight, bias, eps), s
