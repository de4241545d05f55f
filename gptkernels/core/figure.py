"""Pictures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from typing import Any

from gptkernels.core.optional import optional


def figure_class() -> Any:
    """matplotlib's Figure, used without pyplot: no display, no global state.

    Raises ImportError, in one sentence, when matplotlib is missing.
    """
    missing = "drawing the loss curve needs matplotlib: pip install 'gptkernels[all]'"
    return optional("matplotlib.figure", missing).Figure
