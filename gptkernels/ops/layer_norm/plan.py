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
    """The signature of a call, and its plan where one with the same signature was checked before.
    A signature holds all that `op._check` looks at. Raises AttributeError for what is no tensor,
    and TypeError for what cannot be hashed."""
    if type(x) is not Tensor or type(dropout_p) is not float:  # False is no number, but 0 is one
        return None, None
    # The quickest questions that tell all this: they are asked in every call.
    alike = x.is_cpu
    signature: Any = (
        "layer_norm",
        x.shape,
        x.dtype,
        alike or x.device,
        x.is_contiguous(),
        dropout_p,
        eps,
        prenorm,
        residual_in_fp32,
        torch._C._is_any_autocast_enabled() and autocast_enabled(x),
        torch.get_num_threads(),
        torch.is_grad_enabled() and requires_grad((x, weight, bias, residual)),
        weight is not None
        and (weight.shape, weight.dtype, (weight.is_cpu and alike) or weight.device),
        bias is not None and (bias.shape, bias.dtype, (bias.is_cpu and alike) or bias.device),
        residual is not None
        and (
            type(residual) is Tensor,
            residual.shape,
            residual.dtype,
            (residual.is_cpu and alike) or residual.device,
        ),
    )
    return signature, plans.seen(signature)


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
    return call.static if not _plannable(x, weight, bias, residual) else plans.new(signature, call)


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
