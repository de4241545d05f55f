"""Whole models: tokens per second of everyone who ran them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from gptkernels.bench.report import bars
from gptkernels.bench.report.looks import Candidates, Look, figure
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import timed
from gptkernels.bench.results import Row


def pictures(rows: Sequence[Row], candidates: Candidates) -> Iterator[Picture]:
    """One picture, where a whole model was timed, with a panel for each thing it did."""
    counted = [row for row in timed(rows) if row.get("tokens_per_s") is not None]
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in counted:
        label = f"{row['shape']}\n{row['dtype']}, {row['direction']}"
        panels.setdefault(row["op"], {}).setdefault(label, {})[row["impl"]] = row["tokens_per_s"]
    if panels:
        yield Picture(
            name="models",
            title="Whole models: tokens per second",
            alt=f"Bars of tokens per second of whole models: {', '.join(panels)}",
            how="Longer is faster. The longest bar of each group has the same length: compare the "
            "bars of one group.",
            draw=functools.partial(_draw, panels, candidates),
        )


def _draw(panels: Mapping[str, bars.Groups], candidates: Candidates, look: Look) -> Figure:
    heights = [bars.height(groups) for groups in panels.values()]
    drawn = figure(look, 0.2 + sum(height + 0.3 for height in heights))
    grid = drawn.subplots(len(panels), squeeze=False, height_ratios=heights).flatten()
    for axes, (op, groups) in zip(grid, panels.items(), strict=True):
        bars.draw(axes, groups, candidates, look, lambda value: f"{value:,.0f}", op)
    return drawn
