"""Bars of several candidates in groups, with their values beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gptkernels.bench.report.looks import (
    SMALL,
    Candidates,
    Look,
    dress,
    legend,
    literal,
)

Groups = Mapping[str, Mapping[str, float]]
"""Label of a group -> name of a candidate -> its value."""


def height(groups: Groups) -> float:
    """Inches that the groups take."""
    return sum(0.2 * len(bars) + 0.16 for bars in groups.values())


def draw(
    axes: Axes,
    groups: Groups,
    candidates: Candidates,
    look: Look,
    say: Callable[[float], str],
    title: str = "",
) -> None:
    """Draws the groups from the top; `say` words a value."""
    longest = max(value for bars in groups.values() for value in bars.values())
    at = 0.0
    ticks = []
    for bars in groups.values():
        ticks.append(at + (len(bars) - 1) / 2)
        for name, candidate in candidates.items():
            if name not in bars:
                continue
            value = bars[name]
            axes.barh(at, value, height=0.86, color=candidate.colour(look), zorder=3)
            axes.text(
                value + 0.008 * longest,
                at,
                say(value),
                va="center",
                fontsize=SMALL,
                color=look.ink,
                fontweight="bold" if candidate.kind == "ours" else "normal",
            )
            at += 1
        at += 0.8
    axes.set_yticks(ticks, [literal(label) for label in groups])
    dress(axes, look, title)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - 0.8, -0.8)
    axes.set_xlim(0, 1.2 * longest)  # room for the value beside the longest bar
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def key(drawn: Figure, panels: Iterable[Groups], candidates: Candidates, look: Look) -> None:
    """A legend of the candidates that the figure shows."""
    shown = {name for groups in panels for bars in groups.values() for name in bars}
    patches = [
        Patch(color=candidate.colour(look), label=candidate.label)
        for name, candidate in candidates.items()
        if name in shown
    ]
    legend(drawn, look, patches)
