"""The figures of the analyses, as PNG files. Each function raises ImportError, in one sentence,
where matplotlib is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class
from gptkernels.core.files import replacing
from gptkernels.gpt.finetuning.analyses.spread import Table

_COLOURS = ("#c2452d", "#3b6e8f", "#7fa650", "#d9a441", "#7a5c99", "#8c8c8c")
_GROUP = 0.8  # of the width between two groups of bars


def draw_bars(table: Table, metrics: Mapping[str, str], path: Path) -> None:
    """A group of bars for each task (`metrics` names them), a bar for each variant: the mean, and
    the deviation as a whisker."""
    with _axes(path) as axes:
        width = _GROUP / len(table)
        for number, (variant, of_tasks) in enumerate(table.items()):
            shift = (number - (len(table) - 1) / 2) * width
            means = [of_tasks[task].mean for task in metrics]
            bars = axes.bar(
                [place + shift for place in range(len(metrics))],
                means,
                width,
                yerr=[of_tasks[task].deviation for task in metrics],
                capsize=3,
                label=variant,
                color=_COLOURS[number % len(_COLOURS)],
            )
            axes.bar_label(bars, [f"{mean:.3f}" for mean in means], padding=2, fontsize=8)
        axes.set_xticks(range(len(metrics)), _folded(metrics.values()))
        axes.set_ylabel("score")
        axes.margins(y=0.08)


def draw_layers(table: Table, metrics: Mapping[str, str], path: Path) -> None:
    """A line for each task over the variants of `table`, how much was transferred: the mean, and
    the deviation as a band."""
    with _axes(path) as axes:
        places = range(len(table))
        for number, (task, label) in enumerate(metrics.items()):
            spreads = [of_tasks[task] for of_tasks in table.values()]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(
                places, [one.mean for one in spreads], marker="o", ms=4, color=colour, label=label
            )
            low = [one.mean - one.deviation for one in spreads]
            high = [one.mean + one.deviation for one in spreads]
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xticks(places, list(table))
        axes.set_xlabel("blocks transferred (0: the embeddings alone, none: nothing)")
        axes.set_ylabel("score")


def draw_steps(lines: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """A line for each task through its (step, share) points: the shares of the way from chance, 0,
    to no mistake, 1."""
    with _axes(path) as axes:
        for number, (task, points) in enumerate(lines.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=task)
        axes.axhline(0, color="#8c8c8c", linewidth=1, linestyle="--")
        axes.set_xlabel("steps of pre-training")
        axes.set_ylabel("zero-shot accuracy (0: chance, 1: all right)")


@contextlib.contextmanager
def _axes(path: Path) -> Iterator[Any]:
    figure = figure_class()(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _folded(labels: Any) -> list[str]:
    """Labels in two lines: the task, and what its scores are."""
    return [label.replace(" ", "\n", 1) for label in labels]
