"""Other packages whose functions a table may name, as external:NAME."""

from __future__ import annotations

import functools
import importlib.util

# NAME -> the module that its package installs.
MODULES: dict[str, str] = {}


@functools.cache
def missing(name: str) -> str | None:
    """Why a package cannot be taken; None where it is installed."""
    module = MODULES.get(name)
    if module is None:
        return f"there is no external {name!r}"
    found = importlib.util.find_spec(module.partition(".")[0])
    return None if found else f"{module} is not installed"
