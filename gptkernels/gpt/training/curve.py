"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class
from gptkernels.core.files import replacing

LOSSES: dict[str, dict[str, Any]] = {
    "loss": dict(label="training", color="#7aa6c2", linewidth=1.2),
    "validation_loss": dict(
        label="validation", color="#c2452d", linewidth=1.8, marker="o", markersize=3.5
    ),
}
"""The losses in a record, and how each is drawn."""


def draw_losses(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write a PNG of training and validation loss over the steps of `records` (lines of log.jsonl).

    Raises ImportError when matplotlib is missing.
    """
    figure = figure_class()(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, records)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")


def plot_losses(axes: Any, records: Sequence[dict[str, Any]], name: str = "", **style: Any) -> None:
    """Plot the losses on matplotlib's `axes`, `style` in place of their own, `name` before their
    labels."""
    for key, own in LOSSES.items():
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            look = own | {"label": f"{name}{own['label']}"} | style
            axes.plot(*zip(*points, strict=True), **look)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
