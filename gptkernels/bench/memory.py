"""The most memory that a call takes beside what is there when it starts.

On a GPU PyTorch's allocator knows. On a CPU memory comes from several places (PyTorch, buffers of
kernels, libraries), so the process is asked: Linux keeps the highest resident size (VmHWM), and
forgets it when 5 is written to /proc/self/clear_refs (proc(5)). Freed memory that the C library
still holds is given back first, or a call would take from it unnoticed. The figure has the grain of
pages and of the kernel's counters, so a call that takes less than a megabyte has none.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GRAIN = 1 << 20


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Runs the call, and returns the most bytes that it held at one time, its result included; None
    where that cannot be known here, or is too little to be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = _trim()
    if device.type != "cpu" or trim is None:
        return None
    trim(0)
    try:
        _CLEAR.write_text("5")
        before = _kilobytes("VmRSS")
        call()
        taken = 1024 * (_kilobytes("VmHWM") - before)
    except OSError:  # the system has no such file, or lets nobody write it
        return None
    return taken if taken >= _GRAIN else None


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])
