"""Triton kernels and their launchers, one module per op; imported only where Triton is
installed."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shipped:
    """One configuration that a launcher really uses, for the ahead-of-time compile."""

    name: str
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # argument name -> "*bf16", "i32", "fp32", "constexpr" ...
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()  # arguments the launcher's callers align in practice
    # The compute capabilities where the launcher chooses this configuration.
    architectures: tuple[int, ...] = (80, 86, 90, 100)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's. Nothing to do for the
    interpreter's CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """How many programs run at a time; the interpreter runs one after another, two exercise the
    loops."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
