"""Figures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from typing import Any

from gptkernels.core.optional import optional


def figure_class() -> Any:
    """Returns matplotlib's Figure class. Without pyplot it needs no display and no global state.

    Raises ImportError with one sentence where matplotlib is missing.
    """
    missing = "drawing figures needs matplotlib: pip install 'gptkernels[all]'"
    return optional("matplotlib.figure", missing).Figure
