"""Which plan runs a call of `gelu_mlp` with impl="auto"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_dtype, autocast_enabled
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import DTYPES, dtype_name
from gptkernels.core.choice import automatic
from gptkernels.core.plans import Call, Plan
from gptkernels.ops.gelu_mlp import whole

_PLAIN_TYPES = (Tensor, Parameter)
# With more rows the work only repeats.
_MOST_ROWS = {"cpu": 1 << 10, "cuda": 1 << 16}


def known(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    recompute: bool,
) -> tuple[Any, Plan | None]:
    """The signature of a call, or None for one of an unusual kind, and its plan where one with the
    same signature was checked before. A signature holds all that `op._check` looks at."""
    tensors = (x, w1, b1, w2, b2)
    try:
        signature = (
            "gelu_mlp",
            *((type(t), t.shape, t.dtype, t.device) if t is not None else None for t in tensors),
            approximate,
            recompute,
            requires_grad(tensors),
            autocast_enabled(x) and autocast_dtype(x),
            torch.get_num_threads(),
            tuple(None if t is None or t.is_contiguous() else t.stride() for t in tensors),
        )
        return signature, plans.seen(signature)
    except (AttributeError, TypeError):  # something of another kind, which the checks name
        return None, None


def new(
    signature: Any,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    recompute: bool,
) -> Plan:
    """The plan of a call that was checked, for all that have its signature."""
    call = described(x, w1, b1, w2, b2, approximate, recompute)
    tensors = (x, w1, b1, w2, b2)
    plannable = all(
        t is None or (type(t) in _PLAIN_TYPES and t.numel() > 0 and t.dtype in DTYPES)
        for t in tensors
    ) and all(t is None or t.dtype == w1.dtype for t in (b1, w2, b2))
    return plans.new(signature, call) if plannable else call.static


def described(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    recompute: bool,
) -> Call:
    """The call's class and static plan."""
    device, dtype = x.device.type, autocast_dtype(x)
    tensors = (x, w1, b1, w2, b2)
    facts = {
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "dtype": dtype_name(dtype),
        "x": dtype_name(x.dtype),
        "weights": dtype_name(w1.dtype),
        "autocast": autocast_enabled(x),
        "b1": b1 is not None,
        "b2": b2 is not None,
        "C": w1.shape[1],
        "F": w1.shape[0],
        "approximate": approximate,
        "recompute": recompute,
        "transposed": not (w1.is_contiguous() and w2.is_contiguous()),
        "layout": "contiguous" if x.is_contiguous() else "strided",
    }
    sizes = axes(device, x.numel() // max(1, x.shape[-1]))
    chosen = automatic(device)
    training = requires_grad(tensors)
    static = Plan(chosen, chosen)
    return Call("gelu_mlp", training, facts, sizes, static, whole.takes(facts))


def axes(device: str, rows: int) -> dict[str, int]:
    """The sizes that a class goes by: above some, the work only repeats."""
    return {"rows": min(max(1, rows), _MOST_ROWS.get(device, 1 << 16))}
