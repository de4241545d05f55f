"""The machine and the software that a figure was measured on.

A figure without its GPU, driver, versions, commit and command cannot be repeated, so every results
file opens with them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptkernels.core import cpu
from gptkernels.core.machine import cpu_name

_VERSIONS_OF = ("torch", "triton", "numpy", "transformers")


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """The machine and the software that a figure was measured on.

    Keys: time (UTC), command, commit, gptkernels, python, platform, cpu (name, cores that this
    process may use, the load when it asked, and the instruction set of the CPU kernels, None
    without them), cpu_threads, versions (of PyTorch and friends), and gpu (name, driver, CUDA
    runtime, memory, multiprocessors), None without one.
    """
    import gptkernels

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(_command() if command is None else command),
        "commit": commit(),
        "gptkernels": gptkernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in _VERSIONS_OF},
        "gpu": _gpu(),
    }


def commit() -> str | None:
    """The source's commit, with "+changes" when files differ from it.

    The variable GPTKERNELS_COMMIT stands in where the source was copied without its history; None
    where neither is known.
    """
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        head = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
        if head and _output(["git", "-C", str(folder), "ls-files", ":/gptkernels/__init__.py"]):
            changed = _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
            return head + ("+changes" if changed else "")
    return os.environ.get("GPTKERNELS_COMMIT") or None


def _command() -> list[str]:
    """This process's command line, without the folders of this machine's programs."""
    program, *rest = sys.orig_argv
    if rest and Path(rest[0]).name == "gptkernels":
        return ["gptkernels", *rest[1:]]
    return [Path(program).name, *rest]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "instruction_set": None if cpu.unavailable("cpu") else cpu.instruction_set(),
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "count": torch.cuda.device_count(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
