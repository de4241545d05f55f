"""Packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, missing: str) -> Any:
    """The module of that name. Raises ImportError with the sentence `missing` where it cannot be
    imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing) from error
