"""Which implementation runs. An explicit one runs, or an error says why it cannot; only "auto"
chooses.

"auto" picks "torch" on every machine today. No kernel has been timed on a GPU yet, and an
unmeasured kernel must not replace PyTorch's.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from gptkernels.core import native

IMPLEMENTATIONS = ("torch", "triton", "cuda")

# Triton reads the variable when a kernel is decorated, so a later change has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def check_impl(impl: str, *, auto: bool = True) -> str:
    """Returns `impl` if it is the name of an implementation, or "auto" and that is allowed. Raises
    ValueError for any other name."""
    if impl not in IMPLEMENTATIONS and not (auto and impl == "auto"):
        names = "'auto', 'cuda', 'triton' or 'torch'" if auto else "'cuda', 'triton' or 'torch'"
        raise ValueError(f"impl must be {names}, got {impl!r}")
    return impl


def choose(impl: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Returns the implementation that runs on `tensor`, or on `tensor` converted to `dtype`.

    Raises ValueError for an unknown name, and RuntimeError where an explicit implementation cannot
    run on this machine or tensor.
    """
    if check_impl(impl) == "auto":
        return "torch"
    reason = unavailable(impl, tensor.device.type, dtype or tensor.dtype)
    if reason is None:
        return impl
    raise RuntimeError(f"impl={impl!r}: {reason}")


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
    return None
