"""Figures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from typing import Any


def figure_class() -> Any:
    """Returns matplotlib's Figure class. Without pyplot it needs no display and no global state.

    Raises ImportError with one sentence where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "drawing the loss curve needs matplotlib: pip install 'gptkernels[all]'"
        ) from None
    return Figure
