"""Which machine this is, for what is measured once and kept."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as its maker spells it where the system tells."""
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_model() -> str:
    """Family, model and stepping of the processor, as "6/143/8"; "" where the system does not
    tell."""
    numbers = dict.fromkeys(("cpu family", "model", "stepping"), "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in numbers:
                numbers[name.strip()] = value.strip()
    return "/".join(numbers.values()).strip("/")


def fingerprint(device: torch.device) -> str:
    """What a rate measured on `device` depends on, besides the load: device and software."""
    software = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {software}"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {vectors}, {software}"


def cache_folder() -> Path:
    """Where this user's measurements are kept: the variable GPTKERNELS_CACHE, or `gptkernels` in
    XDG_CACHE_HOME, or in ~/.cache."""
    own = os.environ.get("GPTKERNELS_CACHE")
    if own:
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "gptkernels"
