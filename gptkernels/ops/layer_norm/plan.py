"""Which plan runs a call of `layer_norm` with impl="auto"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gptkernels.core import plans
from gptkernels.core.autocast import autocast_enabled
from gptkernels.core.autograd import requires_grad
from gptkernels.core.checks import DTYPES, dtype_name
from gptkernels.core.choice import automatic
from gptkernels.core.plans import Call, Plan
from gptkernels.ops.layer_norm import whole

_PLAIN_TYPES = (Tensor, Parameter)
# With more rows the work only repeats.
_MOST_ROWS = {"cpu": 1 << 14, "cuda": 1 << 17}


def known(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
) -> tuple[Any, Plan | None]:
    """The signature of a call, or None for one of an unusual kind, and its plan where one with the
    same signature was checked before. A signature holds all that `op._check` looks at.

    Asked in every call, beside PyTorch's own of some microseconds: so there are few questions, and
    no calls of functions in Python.
    """
    if type(x) is not Tensor or type(dropout_p) is not float:  # False is no number, but 0 is one
        return None, None
    gradients, alike = torch.is_grad_enabled(), x.is_cpu
    try:
        signature: Any = (
            "layer_norm",
            x.shape,
            x.dtype,
            alike or x.device,
            x.is_contiguous(),
            gradients and x.requires_grad,
            dropout_p,
            eps,
            prenorm,
            residual_in_fp32,
            torch._C._is_any_autocast_enabled() and autocast_enabled(x),
            torch.get_num_threads(),
            weight is not None
            and (
                weight.shape,
                weight.dtype,
                (alike and weight.is_cpu) or weight.device,
                gradients and weight.requires_grad,
            ),
            bias is not None
            and (
                bias.shape,
                bias.dtype,
                (alike and bias.is_cpu) or bias.device,
                gradients and bias.requires_grad,
            ),
            residual is not None
            and (
                type(residual) is Tensor,
                residual.shape,
                residual.dtype,
                (alike and residual.is_cpu) or residual.device,
                gradients and residual.requires_grad,
            ),
        )
        choices = plans.fixed.get()
        return signature, (plans.known if choices is None else choices.known).get(signature)
    except (AttributeError, TypeError):  # something of another kind, which the checks name
        return None, None


def new(
    signature: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
    residual_in_fp32: bool,
) -> Plan:
    """The plan of a call that was checked, for all that have its signature."""
    call = described(x, weight, bias, residual, dropout_p, prenorm, residual_in_fp32)
    # A class says nothing of a bias that has another dtype than all else.
    alone = weight is None and bias is not None and bias.dtype != x.dtype
    plannable = _plannable(x, weight, bias, residual) and not alone
    return plans.new(signature, call) if plannable else call.static


def described(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
    residual_in_fp32: bool,
) -> Call:
    """The call's class and static plan."""
    C, device = x.shape[-1], x.device.type
    facts = {
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "dtype": dtype_name(x.dtype),
        "weights": "none" if weight is None else dtype_name(weight.dtype),
        "bias": bias is not None,
        "residual": "none" if residual is None else dtype_name(residual.dtype),
        "dropout": dropout_p > 0,
        "prenorm": prenorm,
        "wide": residual_in_fp32,
        "C": C,
        "layout": "contiguous" if x.is_contiguous() else "strided",
        "autocast": autocast_enabled(x),
    }
    sizes = axes(device, x.numel() // C)
    chosen = automatic(device)
    training = requires_grad((x, weight, bias, residual))
    static = Plan(chosen, chosen)
    return Call("layer_norm", training, facts, sizes, static, whole.takes(facts))


def _plannable(*tensors: Tensor | None) -> bool:
    return all(
        t is None or (type(t) in _PLAIN_TYPES and t.numel() > 0 and t.dtype in DTYPES)
        for t in tensors
    )


def axes(device: str, rows: int) -> dict[str, int]:
    """The sizes that a class goes by: above some, the work only repeats."""
    return {"rows": min(max(1, rows), _MOST_ROWS.get(device, 1 << 17))}
