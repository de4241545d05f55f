"""The roofline: how near our rows come to what memory and products allow."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gptkernels.bench import text
from gptkernels.bench.report import words
from gptkernels.bench.report.looks import NORMAL, SMALL, Look, dress, figure, legend, literal
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import best_of_ours, grouped
from gptkernels.bench.results import Row

# What places a row, and why one without it has no place.
_NEEDS = {
    "flops": "no FLOPs are counted",
    "bytes": "no bytes are counted",
    "product_ceiling": "no ceiling of products is known",
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def pictures(rows: Sequence[Row], ceilings: dict[str, Any]) -> Iterator[Picture]:
    """One picture, with a panel for each dtype whose ceilings are known."""
    memory = ceilings.get("memory") or []
    ours = best_of_ours(rows)
    placed = [row for row in ours if all(row.get(need) for need in _NEEDS)]
    if placed and memory:
        yield Picture(
            name="roofline",
            title="Roofline: our rows and the ceilings of this machine",
            alt="FLOP per second of our best rows against FLOP per byte, under the ceilings of "
            f"memory and of matrix products, in {words.listed(list(_dtypes(placed)))}",
            how="Every dot is ours, in the colour of its op; the nearer it lies to the line above "
            "it, the less is left to gain. Under the slope memory binds, and under the flat line "
            "arithmetic does. A small case that the caches hold may lie above memory's solid line."
            + _left_out(ours, {row["op"] for row in placed}),
            draw=functools.partial(_draw, placed, memory),
        )


def _left_out(ours: Sequence[Row], placed: set[str]) -> str:
    """The ops without a dot, and why."""
    rows = (row for row in ours if row["op"] not in placed)
    reasons = grouped(
        rows, lambda row: next(why for need, why in _NEEDS.items() if not row.get(need))
    )
    said = (
        f"{words.listed(list(grouped(group, lambda row: row['op'])))}: {why}"
        for why, group in reasons.items()
    )
    listed = "; ".join(said)
    return f" Not in it: {listed}." if listed else ""


def _dtypes(rows: list[Row]) -> dict[str, list[Row]]:
    return grouped(rows, lambda row: row["dtype"])


def _draw(rows: list[Row], memory: list[list[float]], look: Look) -> Figure:
    panels = _dtypes(rows)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    drawn = figure(look, 0.7 + 4.2 * lines)
    grid = drawn.subplots(lines, columns, squeeze=False).flatten()
    ops = list(grouped(rows, lambda row: row["op"]))
    colours = dict(zip(ops, (*look.others, look.ours[0]), strict=False))
    markers = dict(zip(ops, _MARKERS, strict=False))
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (dtype, shown) in zip(grid, panels.items(), strict=False):
        _ceilings(axes, shown, memory, look)
        for row in shown:
            forward = row["direction"] == "forward"
            axes.plot(
                row["flops"] / row["bytes"],
                row["flops"] / row["time_s"],
                linestyle="",
                marker=markers.get(row["op"], "o"),
                markersize=6,
                markeredgecolor=colours.get(row["op"], look.ink),
                markerfacecolor=colours.get(row["op"], look.ink) if forward else "none",
                zorder=3,
            )
        axes.set(xlabel="FLOP per byte that must be moved", ylabel="FLOP/s")
        dress(axes, look)
        _name(axes, dtype, look)
    legend(drawn, look, [_key(op, colours, markers, look) for op in ops] + _fillings(look))
    return drawn


def _ceilings(axes: Axes, rows: list[Row], memory: list[list[float]], look: Look) -> None:
    product = max(row["product_ceiling"] for row in rows)
    at = [row["flops"] / row["bytes"] for row in rows]
    (cache_size, cache), (large, main) = max(memory, key=lambda m: m[1]), max(memory)
    low, high = min(at) / 3, max(*at, 2 * product / main) * 3
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    slopes = {"-": (large, main)}
    if cache > 1.1 * main:
        slopes["--"] = (cache_size, cache)
    for dash, (working_set, speed) in slopes.items():
        axes.plot(
            [low, product / speed],
            [low * speed, product],
            color=look.soft,
            linestyle=dash,
            linewidth=1.4,
            label=f"memory {text.byte_rate(speed)}, working set {words.size(working_set)}",
        )
    axes.plot(
        [min(product / speed for _, speed in slopes.values()), high],
        [product, product],
        color=look.ink,
        linewidth=1.4,
        label=f"products {text.flop_rate(product)}",
    )
    reached = [row["flops"] / row["time_s"] for row in rows]
    axes.set_ylim(min(*reached, low * main) / 2, 2 * max(*reached, product))


def _name(axes: Axes, title: str, look: Look) -> None:
    """The panel's title and what its lines are, above it, where they cover no dot."""
    above = axes.legend(
        title=title,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        alignment="left",
        frameon=False,
        fontsize=SMALL,
        labelcolor=look.ink,
        title_fontproperties={"size": NORMAL, "weight": "bold"},
    )
    above.get_title().set_color(look.ink)


def _key(op: str, colours: dict[str, str], markers: dict[str, str], look: Look) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="",
        marker=markers.get(op, "o"),
        color=colours.get(op, look.ink),
        label=literal(op),
    )


def _fillings(look: Look) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markeredgecolor=look.soft,
            markerfacecolor=face,
            label=label,
        )
        for label, face in (("forward", look.soft), ("backward, or both", "none"))
    ]
