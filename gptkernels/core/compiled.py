"""The modules that an installation compiles, `gptkernels._cpu` and `gptkernels._cuda`: why one is
not there, and the command that makes it. Needs no PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parents[1]


class _Module(NamedTuple):
    systems: tuple[str, ...]  # that it is built on
    left_out: str  # what a build lacks that leaves it out
    compilers: str


MODULES = {
    "cpu": _Module(("linux", "darwin"), "no C++ compiler is", "g++ or clang++"),
    "cuda": _Module(("linux",), "no nvcc or no NVIDIA GPU is", "nvcc 12.8 or newer and g++"),
}


def absent(name: str) -> str | None:
    """Returns why this Python has no `gptkernels._<name>`; None where it has it. `name` is "cpu" or
    "cuda"."""
    if importlib.util.find_spec(f"gptkernels._{name}") is not None:
        return None
    module, kernels = MODULES[name], f"{name.upper()} kernels"
    if not sys.platform.startswith(module.systems):
        return f"the {kernels} are not for {sys.platform}"
    others = sorted(path.name for path in _PACKAGE.glob(f"_{name}.*") if path.suffix != ".tmp")
    if others:
        return f"this installation's {kernels} are for another Python ({', '.join(others)})"
    return f"this installation was built without {kernels}, as one is where {module.left_out}"


def remedy(name: str) -> tuple[str, str] | None:
    """Returns what building the module needs, and the command; None where it is not built for this
    system."""
    module = MODULES[name]
    if not sys.platform.startswith(module.systems):
        return None
    compilers = f"with {module.compilers} on PATH"
    build = f"GPTKERNELS_BUILD_{name.upper()}=1 pip install -v --no-deps"
    checkout = _PACKAGE.parent
    if (checkout / "setup.py").is_file():
        return compilers, f"{build} -e {shlex.quote(str(checkout))}"
    return f"{compilers}, in a checkout of the sources", f"{build} --force-reinstall ."


def why_absent(name: str) -> str | None:
    """Returns `absent` and `remedy` as one sentence; None where the module is there."""
    reason, help_ = absent(name), remedy(name)
    return reason if reason is None or help_ is None else f"{reason}; {help_[0]}: {help_[1]}"


def compiled_for(name: str) -> str:
    """Returns what the module was compiled for: instruction sets, or architectures of GPUs. Raises
    ImportError where it cannot be loaded or is older than the package."""
    module = importlib.import_module(f"gptkernels._{name}")
    try:
        return str(module.compiled_for)
    except AttributeError:
        raise ImportError("it is older than the package beside it: install again") from None
