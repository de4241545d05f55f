"""What the tables say of a call, for modules that have a rule of their own where nothing was
measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.plans import Plan
from gptkernels.ops.attention import dense
from gptkernels.ops.gelu_mlp import op as mlp_op
from gptkernels.ops.layer_norm import op as norm_op


def asked(x: Any) -> bool:
    """Whether a table could say something of calls with x, or somebody records them."""
    return not torch.compiler.is_compiling() and plans.asked(x.device.type)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> bool | None:
    """Whether the op is to run; None where nothing was measured. Raises as the op does."""
    return _runs(norm_op.plan_of(x, weight, bias, eps=eps)) if asked(x) else None


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> bool | None:
    """As `layer_norm`."""
    if not asked(x):
        return None
    return _runs(mlp_op.plan_of(x, w1, b1, w2, b2, approximate=approximate))


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
    """Whether anything was measured of a call that asked for q (B, Tq, H, D), k and v (B, Tk, Hk,
    D), with options as `dense.plan_of` takes them. The op then runs: it knows PyTorch's function
    too. Raises as the op does."""
    return dense.plan_of(q, k, v, **options).measured


def _runs(way: Plan) -> bool | None:
    return way.whole is None if way.measured else None
