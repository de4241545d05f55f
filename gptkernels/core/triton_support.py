"""What the launchers of Triton kernels share. Importing this module does not import Triton."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The sizes of the blocks that a program of a kernel works on, then its warps and stages, such as
# (128, 64, 8, 3). Launchers choose tiles by themselves; tuning gives them others, by keyword.
Tile = tuple[int, ...]


@dataclass(frozen=True)
class Shipped:
    """One configuration that a launcher uses, for the ahead-of-time compile of the gates."""

    name: str
    kernel: Any  # a @triton.jit function
    signature: dict[str, str]  # argument name -> "*bf16", "i32", "fp32", "constexpr" ...
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()  # arguments that are usually multiples of 16
    # The compute capabilities where the launcher chooses this configuration.
    architectures: tuple[int, ...] = (80, 86, 90, 100)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that makes the tensor's device the current one, where Triton launches. It
    does nothing for CPU tensors, which the interpreter runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Returns the number of multiprocessors of the tensor's GPU. For CPU tensors it is 2: enough
    programs to test the loops over them, since the interpreter runs one after another."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
