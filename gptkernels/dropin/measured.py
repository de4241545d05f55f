"""What the tables say of a call, for modules that have a rule of their own where nothing was
measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.plans import Plan
from gptkernels.ops.attention import dense
from gptkernels.ops.gelu_mlp import plan as gelu_mlp_plan
from gptkernels.ops.layer_norm import plan as layer_norm_plan


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> bool | None:
    """Whether the op is to run, which is given what it takes; None where nothing was measured."""
    if not _asked(x):
        return None
    signature, way = layer_norm_plan.known(x, weight, bias, None, 0.0, eps, False, False)
    if way is None:
        way = layer_norm_plan.new(signature, x, weight, bias, None, 0.0, False, False)
    return _runs(way)


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> bool | None:
    """As `layer_norm`."""
    if not _asked(x):
        return None
    given: Any = (x, w1, b1, w2, b2, approximate, False)
    signature, way = gelu_mlp_plan.known(*given)
    return _runs(gelu_mlp_plan.new(signature, *given) if way is None else way)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool | None:
    """As `layer_norm`; for q (B, Tq, H, D), k and v (B, Tk, Hk, D), as `dense.plan_of` takes them.
    The op itself knows PyTorch's function, so it runs where anything was measured."""
    if not _asked(q):
        return None
    return True if dense.plan_of(q, k, v, **options).measured else None


def _asked(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and plans.asked(x.device.type)


def _runs(way: Plan) -> bool | None:
    return way.whole is None if way.measured else None
