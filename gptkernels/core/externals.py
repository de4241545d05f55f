"""Other packages whose functions a table may name, as external:NAME."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib.machinery import PathFinder
from typing import Any

from gptkernels.core.errors import in_a_line

# NAME -> the module that has the functions.
MODULES: dict[str, str] = {
    "flash_attn2": "flash_attn.flash_attn_interface",
    "flash_attn3": "flash_attn_interface",
    "flash_attn4": "flash_attn.cute",
    "liger": "liger_kernel.ops.layer_norm",
}
# What else has to be there. FlashAttention-2 and -4 share the folder flash_attn, and some releases
# of the former hold an unfinished copy of the latter, which cannot run without the CUTLASS DSL.
_SIGNS = {"flash_attn4": ("flash_attn.cute.interface", "cutlass")}


@functools.cache
def missing(name: str) -> str | None:
    """Why a package cannot be taken; None where it is installed, and imports."""
    module = MODULES.get(name)
    if module is None:
        return f"there is no external {name!r}"
    if not is_installed(name):
        return f"{module} is not installed"
    try:
        load(name)
    except Exception as error:  # a package made for another PyTorch or CUDA raises all kinds
        return f"{module} is installed but does not import: {in_a_line(error)}"
    return None


def is_installed(name: str) -> bool:
    """Whether the package's files are there: it is imported when a table names it."""
    return all(is_there(sign) for sign in (MODULES[name], *_SIGNS.get(name, ())))


@functools.cache
def load(name: str) -> Any:
    """The module of a package's functions. Raises whatever its import does."""
    return importlib.import_module(MODULES[name])


def is_there(module: str) -> bool:
    """Whether the module's file is, without importing any package around it."""
    name, *rest = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec is not None
