"""Which implementation runs. An explicit one runs, or an error says why it cannot; only "auto"
chooses.

"auto" takes what a table says (core/plans.py). Where none says anything, it begins with the static
policy that is here: the CPU kernels in eager mode where they were measured to be faster than
impl="torch" (`_FASTER_ON`), and impl="torch" everywhere else. GPTKERNELS_IMPL=torch in the
environment makes it take impl="torch" everywhere.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from gptkernels.core import cpu, native
from gptkernels.core.names import check_name
from gptkernels.core.torchscript import refuse_trace

IMPLEMENTATIONS = ("torch", "triton", "cuda", "cpu")
_OR_AUTO = ("auto", *IMPLEMENTATIONS)
# The instruction sets on which the CPU kernels were measured to be faster than impl="torch"
# (benchmarks/results, docs/cpu.md).
_FASTER_ON = ("v3", "v4", "v4_bf16", "v4_amx")

# Triton reads the variable when a kernel is decorated, so a later change has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def check_impl(impl: str, *, auto: bool = True) -> str:
    """Returns `impl` if it is the name of an implementation, or "auto" and that is allowed. Raises
    ValueError for any other name."""
    return check_name("impl", impl, _OR_AUTO if auto else IMPLEMENTATIONS)


def choose(impl: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Returns the implementation that runs on `tensor`, or on `tensor` converted to `dtype`.

    Raises ValueError for an unknown name, RuntimeError where an explicit implementation cannot run
    on this machine or tensor, and NotImplementedError under torch.jit.trace.
    """
    refuse_trace()
    if impl == "auto":
        # Inductor fuses impl="torch" with what is around it, and cannot look into a kernel.
        if torch.compiler.is_compiling() or not tensor.is_cpu:
            return "torch"
        return automatic("cpu")
    reason = unavailable(check_impl(impl), tensor.device.type, dtype or tensor.dtype)
    if reason is None:
        return impl
    raise RuntimeError(f"impl={impl!r}: {reason}")


def switched_off() -> bool:
    """Whether the kill switch is set: then "auto" takes PyTorch's operators everywhere. Raises
    ValueError where GPTKERNELS_IMPL has a value that it cannot have."""
    switch = os.environ.get("GPTKERNELS_IMPL", "")
    if switch not in ("", "torch"):
        raise ValueError(
            f"GPTKERNELS_IMPL is {switch!r}, but it can only be 'torch': then impl='auto' takes "
            "PyTorch's operators"
        )
    return switch == "torch"


def automatic(device_type: str) -> str:
    """Returns the implementation that "auto" picks on tensors of this device type. Raises
    ValueError where the variable GPTKERNELS_IMPL has a value that it cannot have."""
    if switched_off():
        return "torch"
    here = cpu.unavailable(device_type) is None
    return "cpu" if here and cpu.instruction_set() in _FASTER_ON else "torch"


def unavailable(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Returns why an implementation cannot run on tensors of this device type and dtype; None where
    it can."""
    match check_impl(impl, auto=False):
        case "triton":
            if not _TRITON_INSTALLED:
                return "Triton is not installed (pip install triton; Linux only)"
            if INTERPRETED and dtype == torch.bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
            if device_type != "cuda" and not INTERPRETED:
                return (
                    f"it runs on CUDA tensors (this one is on {device_type}), "
                    "or anywhere under TRITON_INTERPRET=1"
                )
        case "cuda":
            return native.unavailable(device_type)
        case "cpu":
            return cpu.unavailable(device_type)
    return None
