"""Curves of runs as pictures: the losses of one, or any number in the logs of several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from gptkernels.core.figure import figure_class
from gptkernels.core.files import make_folder, replacing
from gptkernels.core.names import hint
from gptkernels.gpt.options import one_of

Record = Mapping[str, Any]

LOSSES: dict[str, dict[str, Any]] = {
    "loss": dict(label="training", color="#7aa6c2", linewidth=1.2),
    "validation_loss": dict(
        label="validation", color="#c2452d", linewidth=1.8, marker="o", markersize=3.5
    ),
}
"""The losses in a record, and how each is drawn."""

AXES = {
    "step": "step",
    "tokens": "tokens trained on",
    "seconds": "seconds",
    "petaflop_s_days": "petaflop/s-days",
}
"""What curves may be drawn over, with the words below the axis."""

FORMATS = (".png", ".svg", ".pdf")
_LOSS = "loss (nats per token)"
_COLOURS = ("#1f77b4", "#c2452d", "#2f8f5b", "#8d5fb0", "#c98a12", "#2aa5b5", "#8c564b", "#707070")
_LINES = ("-", "--", ":")  # of more runs than there are colours


def draw_losses(records: Sequence[Record], path: str | Path) -> None:
    """Write a PNG of training and validation loss over the steps of `records` (lines of log.jsonl).

    Raises ImportError when matplotlib is missing.
    """
    figure = figure_class()(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, records)
    axes.set_xlabel(AXES["step"])
    axes.set_ylabel(_LOSS)
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")


def plot_losses(axes: Any, records: Sequence[Record], name: str = "", **style: Any) -> None:
    """Plot the losses on matplotlib's `axes`, `style` in place of their own, `name` before their
    labels."""
    for key, own in LOSSES.items():
        if found := points(records, "step", key):
            look = own | {"label": f"{name}{own['label']}"} | style
            axes.plot(*zip(*found, strict=True), **look)
    _finish(axes)


def draw_runs(
    runs: Mapping[str, Sequence[Record]],
    path: Path,
    *,
    by: str = "step",
    metric: str = "loss",
) -> None:
    """Write a picture of a number in the logs of several runs, each with its name and colour.

    runs: name -> lines of log.jsonl. by: one of AXES. metric: a number of the lines; with "loss"
    the training loss is pale, and the validation loss stands on it with a dot for each validation.

    Raises ValueError where a run has no such number, or where `path` ends in none of FORMATS,
    ImportError when matplotlib is missing, OSError when the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"out: {path} must end in {one_of(FORMATS)}")
    # Small, so that its words stay readable where a page shows it at half of its width.
    figure = figure_class()(figsize=(5.6, 3.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = itertools.cycle((line, colour) for line in _LINES for colour in _COLOURS)
    for (name, records), (line, colour) in zip(runs.items(), looks, strict=False):
        curves = {metric: points(records, by, metric)}
        if metric == "loss":
            curves["validation_loss"] = points(records, by, "validation_loss")
        drawn = {key: found for key, found in curves.items() if found}
        if not drawn:
            raise ValueError(_nothing(name, records, by, metric))
        for key, found in drawn.items():
            look: dict[str, Any] = dict(color=colour, linestyle=line, linewidth=1.6)
            if "validation" in key:
                look |= dict(marker="o", markersize=3)
            if key != list(drawn)[-1]:  # the training loss below the validation loss
                look |= dict(alpha=0.4, linewidth=1.0)
            else:
                look["label"] = name
            axes.plot(*zip(*found, strict=True), **look)
    axes.set_xlabel(AXES[by])
    axes.set_ylabel(_LOSS if metric.endswith("loss") else metric.replace("_", " "))
    if metric == "loss":
        axes.set_title("pale: training, with dots: validation", fontsize=9, loc="right")
    _finish(axes)
    make_folder("the folder of out", path.parent)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def points(records: Sequence[Record], by: str, key: str) -> list[tuple[float, float]]:
    """The points of the curve of `key` over `by`. The line before the first step, which is of a
    validation alone, has nothing of what is counted: all of it is 0."""
    if not any(by in record for record in records):
        return []
    found = ((r.get(by, None if r["step"] else 0), r.get(key)) for r in records)
    return [(x, y) for x, y in found if _is_number(x) and _is_number(y)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nothing(name: str, records: Sequence[Record], by: str, metric: str) -> str:
    numbers = sorted({key for r in records for key, value in r.items() if _is_number(value)})
    if not numbers:
        return f"the log of {name} has no record"
    lacking = by if by not in numbers else metric
    known = [key for key in numbers if key not in AXES]
    return f"the log of {name} has no {lacking}; it has {', '.join(known)}{hint(metric, known)}"


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
