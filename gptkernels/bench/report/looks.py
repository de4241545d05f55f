"""How figures look, in light and in dark: one palette each, and one colour for a candidate.

Warm colours are ours, cool ones are others', grey is plain PyTorch. Each candidate also has a
marker of its own, so that no line rests on its colour alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptkernels.bench.report.summary import grouped, timed
from gptkernels.bench.results import Row

WIDTH = 9.0
"""Inches: every figure is as wide as the page."""
DPI = 160
SMALL, NORMAL = 8.0, 9.0
"""Sizes of text in points."""
LONGEST = 56
"""Letters of a line in a label."""
_TITLE = 90  # letters of titles side by side


@dataclass(frozen=True)
class Look:
    """The colours of a figure; `ours` and `others` are taken in turn."""

    name: str
    back: str
    ink: str
    soft: str
    line: str
    good: str
    bad: str
    same: str
    plain: str
    ours: tuple[str, ...]
    others: tuple[str, ...]


# Of Okabe and Ito's palette, which the colour-blind tell apart, and shades beside it.
LIGHT = Look(
    name="light",
    back="#ffffff",
    ink="#1d2730",
    soft="#5d6b78",
    line="#dfe4e8",
    good="#009e73",
    bad="#d1402f",
    same="#d9dee2",
    plain="#7c8894",
    ours=("#d55e00", "#c4760a", "#b8860b", "#a3194f", "#e0457b", "#7a4419"),
    others=("#0072b2", "#009e73", "#9a4f9e", "#45a5dc", "#3b3b98", "#7a7a00", "#1f8a8a"),
)
DARK = Look(
    name="dark",
    back="#1c2329",
    ink="#e4e9ed",
    soft="#9aa7b2",
    line="#333d46",
    good="#2fbf93",
    bad="#f0705f",
    same="#3d4852",
    plain="#9aa7b2",
    ours=("#ff8a3d", "#ffb072", "#e8c04a", "#ff7aa8", "#ff5f57", "#c99a6b"),
    others=("#55aef0", "#3fd0a0", "#d08ad6", "#9fd8ff", "#a8a0ff", "#c6c64e", "#5fd3d3"),
)
LOOKS = (LIGHT, DARK)

_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_OUR_MARKERS = ("o", "p", "h", "d", "*", "8")
_OUR_DASHES = ("-", (0, (8, 1)), "--", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 0.6)))
# Fixed, so that ours look the same in every report.
_OUR_PLACES = {
    name: i
    for i, name in enumerate(("cuda", "cpu", "triton", "torch", "auto", "torch.compile of ours"))
}


@dataclass(frozen=True)
class Candidate:
    """One implementation in every figure; `index` counts those of its kind."""

    label: str
    kind: str
    index: int

    def colour(self, look: Look) -> str:
        """The candidate's colour."""
        if self.kind == "baseline":
            return look.plain
        colours = look.ours if self.kind == "ours" else look.others
        return colours[self.index % len(colours)]

    def line(self, look: Look) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`: ours are thick and lie on top."""
        ours = self.kind == "ours"
        plain = self.kind == "baseline"
        markers = _OUR_MARKERS if ours else _MARKERS
        return {
            "label": self.label,
            "color": self.colour(look),
            "marker": "o" if plain else markers[self.index % len(markers)],
            "linestyle": _OUR_DASHES[self.index % len(_OUR_DASHES)]
            if ours
            else ":"
            if plain
            else "-",
            "linewidth": 2.6 if ours else 1.2,
            "markersize": 6.5 if ours else 4.5,
            "markeredgecolor": look.back if ours else self.colour(look),
            "zorder": 4 if ours else 3,
        }


Candidates = dict[str, Candidate]


def candidates(rows: Iterable[Row]) -> Candidates:
    """Every implementation that was timed by its name: plain PyTorch, ours, then the peers."""
    names = grouped({row["impl"]: row["kind"] for row in timed(rows)}.items(), lambda pair: pair[1])
    found = {
        name: Candidate("plain PyTorch", "baseline", 0) for name, _ in names.get("baseline", [])
    }
    for i, (name, _) in enumerate(names.get("ours", [])):
        place = _OUR_PLACES.get(name, len(_OUR_PLACES) + i)
        found[name] = Candidate(literal(f"gptkernels {name}"), "ours", place)
    for i, (name, _) in enumerate(names.get("peer", [])):
        found[name] = Candidate(literal(name), "peer", i)
    return found


def literal(text: str, letters: int = LONGEST) -> str:
    """Text that matplotlib draws as it is, where a dollar starts no formula, in lines of so many
    letters."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, letters)]
    return "\n".join(lines).replace("$", r"\$")


def lines_of(label: str) -> int:
    """Lines that a label takes."""
    return label.count("\n") + 1


def figure(look: Look, height: float) -> Figure:
    """An empty figure of that many inches."""
    return Figure(
        figsize=(WIDTH, height),
        dpi=DPI,
        layout="constrained",
        facecolor=look.back,
        edgecolor=look.back,
    )


def dress(axes: Axes, look: Look, title: str = "", beside: int = 1) -> None:
    """The axes in the look's colours, with a title and a grid behind what is drawn; `beside`:
    panels that share the width."""
    title = literal(title, int(_TITLE / beside))
    axes.set_title(title, loc="left", color=look.ink, fontsize=NORMAL, fontweight="bold")
    axes.set_facecolor(look.back)
    axes.set_axisbelow(True)
    axes.grid(color=look.line, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look.soft)
    axes.tick_params(which="both", colors=look.soft, labelsize=SMALL, labelcolor=look.ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=look.soft, fontsize=SMALL)


def legend(drawn: Figure, look: Look, handles: Sequence[Any]) -> None:
    """One legend above all panels, in as many columns as fit."""
    longest = max(len(line) for handle in handles for line in handle.get_label().split("\n"))
    columns = max(1, int(WIDTH / (0.55 + 0.085 * longest)))
    drawn.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=NORMAL,
        labelcolor=look.ink,
        handlelength=2.6,
    )
