"""The CPU kernels' module, `gptkernels._cpu`: whether it runs here, and what calls of it share.

The kernels run on PyTorch's own threads. GPTKERNELS_CPU_ISA in the environment names a lower
instruction set than the highest that the CPU has.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import compiled

ISA_VARIABLE = "GPTKERNELS_CPU_ISA"

# The values of `gk::cpu::DType`.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device_type: str) -> str | None:
    """Returns why the kernels cannot run on tensors of this device type; None where they can."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, this one is on {device_type}"
    return _unavailable()


# As native.unavailable: torch.compile takes the answer as a constant.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _unavailable() -> str | None:
    reason = compiled.why_absent("cpu")
    if reason is not None:
        return reason
    try:
        module()
    except ImportError as error:
        return f"the CPU kernels cannot be loaded: {error}"
    except ValueError as error:
        return f"{ISA_VARIABLE}: {error}"
    return None


@functools.cache
def module() -> Any:
    """Returns the compiled module. Raises ImportError where there is none, and ValueError for a
    GPTKERNELS_CPU_ISA that the machine or the module lacks."""
    loaded = importlib.import_module("gptkernels._cpu")
    isa = os.environ.get(ISA_VARIABLE)
    if isa:
        loaded.use(isa)
    return loaded


@functools.cache
def instruction_set() -> str:
    """Returns the instruction set of the kernels, asked once: only tests change it afterwards.
    Raises as `module` does."""
    return str(module().instruction_set())


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that the kernels are compiled for and this CPU has, the lowest first."""
    return tuple(module().instruction_sets())


def run_on(isa: str, function: Callable[..., Any], *given: Any) -> Any:
    """function(*given), whose kernels, of this thread's calls, run on an instruction set."""
    loaded = module()
    loaded.prefer(isa)
    try:
        return function(*given)
    finally:
        loaded.prefer("")


def address(tensor: Tensor | None) -> int:
    """Returns a tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
