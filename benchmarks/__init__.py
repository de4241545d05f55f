"""The pytest-benchmark suite over gptkernels.bench, and scripts that measure and tune on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent


def child_environment(**variables: str) -> dict[str, str]:
    """The environment for `python -P -m benchmarks...`, with more variables: -P leaves the working
    folder out of the path, so the checkout has to be named."""
    path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | variables
