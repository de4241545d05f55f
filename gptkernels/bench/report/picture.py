"""A figure of the report and the words beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from gptkernels.bench.report.looks import Look


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn once for each look.

    Args:
        name: the start of its files' names.
        title: the heading above it.
        alt: what it shows, for those who do not see it.
        how: one sentence or two on how to read it.
        draw: draws it.
    """

    name: str
    title: str
    alt: str
    how: str
    draw: Callable[[Look], Figure]
