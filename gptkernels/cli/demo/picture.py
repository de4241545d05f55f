"""The losses of the demo's training, and of its plain twin: a PNG, and an SVG for the page, whose
colours are the page's own, in light and in dark."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from gptkernels.bench.report.looks import LIGHT, SMALL, Look, dress
from gptkernels.gpt.training.plain import Curve

ALT = "Losses by step of gptkernels and of the same model in plain PyTorch"
_SIZE = (4.4, 3.0)  # inches: so small that letters stay legible where a phone shrinks it
# Colours that stand for variables of the page, which has a value of each for light and for dark.
_VARIABLES = {
    "#010101": "--card",
    "#010102": "--ink",
    "#010103": "--soft",
    "#010104": "--line",
    "#010105": "--plain",
    "#010106": "--ours",
    "#010107": "--held-out",
}
_BACK, _INK, _SOFT, _LINE, _PLAIN, _OURS, _HELD_OUT = _VARIABLES
_PAGE = dataclasses.replace(
    LIGHT,
    name="page",
    back=_BACK,
    ink=_INK,
    soft=_SOFT,
    line=_LINE,
    plain=_PLAIN,
    ours=(_OURS, _HELD_OUT),
)


def png(ours: Curve, plain: Curve) -> bytes:
    """The picture as a file of its own, in light."""
    file = io.BytesIO()
    _drawn(ours, plain, LIGHT).savefig(file, format="png", dpi=200)
    return file.getvalue()


def svg(ours: Curve, plain: Curve) -> str:
    """The picture as an element of the page, as wide as the page lets it."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Letters stay letters, which can be read aloud and searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptkernels"}):
        figure = _drawn(ours, plain, _PAGE)
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    element = file.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    for colour, name in _VARIABLES.items():
        element = element.replace(colour, f"var({name})")
    return element.replace("<svg", f'<svg class="curve" role="img" aria-label="{ALT}"', 1)


def _drawn(ours: Curve, plain: Curve, look: Look) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained", facecolor=look.back)
    axes = figure.subplots()
    dress(axes, look)
    training, held_out = look.ours[:2]
    # The plain twin wide and pale, ours thin on top: one that left the other would be seen.
    wide = {"linewidth": 6, "alpha": 0.5, "solid_capstyle": "round"}
    _plot(axes, plain, "loss", label="plain PyTorch", color=look.plain, **wide)
    _plot(axes, ours, "loss", label="gptkernels", color=training, linewidth=1.4)
    dots = {"marker": "o", "markersize": 3}
    _plot(axes, ours, "validation_loss", label="its validation", color=held_out, **dots)
    axes.set_xscale("log")  # the twin has a share of the steps, in which the losses fall most
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step, on a logarithmic scale")
    axes.set_ylabel("loss, nats a byte")
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=look.ink)
    return figure


def _plot(axes: Axes, curve: Curve, name: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in curve if r["step"] and r.get(name) is not None]
    if len(points) == 1:  # a line of one point would not be seen
        style = {"marker": "o", **style}
    if points:
        axes.plot(*zip(*points, strict=True), **style, zorder=3)
