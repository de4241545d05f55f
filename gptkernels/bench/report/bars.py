"""Bars of several candidates in groups, with values and names beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes

from gptkernels.bench.report.looks import SMALL, Candidates, Look, dress, lines_of, literal

Groups = Mapping[str, Mapping[str, float]]
"""Label of a group -> name of a candidate -> its value."""

_BAR, _GAP = 0.2, 0.16  # inches
_LINE = 0.14  # of a label


def height(groups: Groups) -> float:
    """Inches that the groups take."""
    return _BAR * sum(_bars(label, bars) for label, bars in groups.items()) + _GAP * len(groups)


def draw(
    axes: Axes,
    groups: Groups,
    candidates: Candidates,
    look: Look,
    say: Callable[[float], str],
    title: str = "",
) -> None:
    """Draws the groups from the top, the longest bar of each as long as the axes; `say` words a
    value."""
    at = 0.0
    ticks = []
    for label, bars in groups.items():
        room = _bars(label, bars)
        ticks.append(at + room / 2)
        shown = [name for name in candidates if name in bars]
        longest = max(bars.values())
        for i, name in enumerate(shown):
            candidate, value = candidates[name], bars[name]
            middle = at + (room - len(shown) + 1) / 2 + i
            share = value / longest
            axes.barh(middle, share, height=0.86, color=candidate.colour(look), zorder=3)
            # It may lie beside the axes, whose layout makes room for it.
            axes.text(
                share + 0.01,
                middle,
                f"{say(value)}  {candidate.label}",
                va="center",
                fontsize=SMALL,
                color=look.ink,
                fontweight="bold" if candidate.kind == "ours" else "normal",
            )
        at += room + _GAP / _BAR
    axes.set_yticks(ticks, [literal(label) for label in groups])
    dress(axes, look, title)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - _GAP / _BAR, 0)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _bars(label: str, bars: Mapping[str, float]) -> float:
    """The room of a group, in bars."""
    return max(len(bars), lines_of(literal(label)) * _LINE / _BAR)
