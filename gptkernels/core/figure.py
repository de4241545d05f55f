"""Pictures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from typing import Any


def figure_class() -> Any:
    """matplotlib's Figure, used without pyplot: no display, no global state.

    Raises ImportError, in one sentence, when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "drawing the loss curve needs matplotlib: pip install 'gptkernels[all]'"
        ) from None
    return Figure
