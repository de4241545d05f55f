"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class


def draw_losses(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write a PNG of training and validation loss over the steps of `records` (lines of log.jsonl).

    Raises ImportError when matplotlib is missing.
    """
    Figure = figure_class()
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if training:
        axes.plot(*zip(*training, strict=True), color="#7aa6c2", linewidth=1.2, label="training")
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color="#c2452d",
            linewidth=1.8,
            marker="o",
            markersize=3.5,
            label="validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if training or validation:
        axes.legend(frameon=False)
    figure.savefig(path)
