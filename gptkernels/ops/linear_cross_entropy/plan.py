"""Which plan runs a call of `linear_cross_entropy` with impl="auto"."""

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
from gptkernels.core.tuned import PYTORCH
from gptkernels.ops.linear_cross_entropy import whole
from gptkernels.ops.linear_cross_entropy.options import LossOptions

_PLAIN_TYPES = (Tensor, Parameter)
# With more rows the work only repeats.
_MOST_ROWS = {"cpu": 1 << 12, "cuda": 1 << 16}
# Up to so many, 4 MiB in fp32, the calls that a chunk makes take longer than its logits.
_FEW_LOGITS = 1 << 20


def known(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
) -> tuple[Any, Plan | None]:
    """The signature of a call, or None for one of an unusual kind, and its plan where one with the
    same signature was checked before. A signature holds all that `op._check` looks at."""
    tensors = (x, weight, bias, targets)
    gradients = torch.is_grad_enabled()
    try:
        signature = (
            "linear_cross_entropy",
            *((type(t), t.shape, t.dtype, t.device) if t is not None else None for t in tensors),
            # True is 1 in a key, but no ignore_index.
            *((type(number), number) for number in options),
            reduction,
            tuple(gradients and t is not None and t.requires_grad for t in tensors),
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
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
) -> Plan:
    """The plan of a call that was checked, for all that have its signature."""
    call = described(x, weight, bias, targets, options, reduction)
    plannable = (
        all(
            t is None or (type(t) in _PLAIN_TYPES and t.numel() > 0 and t.dtype in DTYPES)
            for t in (x, weight, bias)
        )
        and type(targets) is Tensor
        and (bias is None or bias.dtype == weight.dtype)
    )
    if plannable:
        return plans.new(signature, call)
    chosen = automatic(x.device.type)
    return Plan(chosen, chosen)


def described(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
) -> Call:
    """The call's class and static plan."""
    device, dtype = x.device.type, autocast_dtype(x)
    tensors = (x, weight, bias)
    facts = {
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "dtype": dtype_name(dtype),
        "x": dtype_name(x.dtype),
        "weights": dtype_name(weight.dtype),
        "autocast": autocast_enabled(x),
        "bias": bias is not None,
        "C": weight.shape[1],
        "V": weight.shape[0],
        "label_smoothing": options.label_smoothing > 0,
        "z_loss": options.z_loss > 0,
        "softcap": options.softcap > 0,
        "reduction": reduction,
        # Which gradients are wanted: a frozen head leaves out a third of the work.
        "gradients": "".join(
            name
            for name, t in zip(("x", "w", "b"), tensors, strict=True)
            if t is not None and t.requires_grad and torch.is_grad_enabled()
        ),
        "layout": "contiguous" if x.is_contiguous() else "strided",
        "few": targets.numel() * weight.shape[0] <= whole.MOST_LOGITS,
    }
    sizes = axes(device, targets.numel())
    chosen, others = automatic(device), whole.takes(facts)
    static = Plan(chosen, chosen)
    if others and targets.numel() * weight.shape[0] <= _FEW_LOGITS:
        static = Plan("torch", "torch", PYTORCH)
    return Call("linear_cross_entropy", requires_grad(tensors), facts, sizes, static, others)


def axes(device: str, rows: int) -> dict[str, int]:
    """The sizes that a class goes by: above some, the work only repeats."""
    return {"rows": min(max(1, rows), _MOST_ROWS.get(device, 1 << 16))}
