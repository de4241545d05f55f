"""Rates against a size: attention against its tokens, LayerNorm and GELU-MLP against theirs."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gptkernels.bench import text
from gptkernels.bench.report import words
from gptkernels.bench.report.looks import (
    SMALL,
    Candidates,
    Look,
    dress,
    figure,
    legend,
)
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import grouped, timed
from gptkernels.bench.results import Row

_PANEL_ROWS = 5
_TOKENS = "tokens"  # of all sequences together, which sizes do not name
# A ceiling farther above the highest line would press all lines to the ground.
_FITS = 1.8


@dataclass(frozen=True)
class View:
    """One op's rate against one size.

    Args:
        op: the operator.
        x: the size along the axis, a key of a row's sizes, and `words`, its name.
        rate: the key of the rate, bytes_per_s or flops_per_s.
        panel: sizes that each panel has one value of.
        split: sizes that part a panel further, where several of its shapes have the same x.
    """

    op: str
    x: str
    words: str
    rate: str
    panel: tuple[str, ...] = ()
    split: tuple[str, ...] = ()

    @property
    def ceiling(self) -> str:
        """The key of the rate that this machine reaches."""
        return "memory_ceiling" if self.rate == "bytes_per_s" else "product_ceiling"


VIEWS = (
    View(
        "attention",
        "T",
        "tokens in a sequence (T)",
        "flops_per_s",
        ("D",),
        ("B", _TOKENS, "H", "Hk"),
    ),
    View("attention_decode", "T", "keys (T)", "bytes_per_s", ("D", "Tq"), ("B", "H", "Hk")),
    View("layer_norm", "C", "width (C)", "bytes_per_s", (), ("rows",)),
    View("layer_norm", "rows", "rows", "bytes_per_s", ("C",)),
    View("gelu_mlp", "rows", "rows", "flops_per_s", ("C", "F")),
    View("gelu_mlp", "C", "width (C)", "flops_per_s", ("rows",)),
    View("linear_cross_entropy", "rows", "rows", "flops_per_s", ("C", "V")),
)


@dataclass(frozen=True)
class Panel:
    """The rows of one panel in every direction, and its name."""

    title: str
    rows: list[Row]


def pictures(rows: Sequence[Row], candidates: Candidates) -> Iterator[Picture]:
    """A picture for each view and dtype that has at least one line."""
    for view in VIEWS:
        seen = [
            row
            for row in timed(rows)
            if row["op"] == view.op
            and row.get(view.rate) is not None
            and view.x in row.get("sizes", {})
        ]
        for dtype, group in grouped(seen, lambda row: row["dtype"]).items():
            panels = list(_panels(view, group))
            for part in range(0, len(panels), _PANEL_ROWS):
                yield _picture(view, dtype, panels, part, candidates)


def _picture(
    view: View, dtype: str, panels: list[Panel], part: int, candidates: Candidates
) -> Picture:
    shown = panels[part : part + _PANEL_ROWS]
    unit = "FLOP/s" if view.rate == "flops_per_s" else "bytes per second"
    number = f"_{part // _PANEL_ROWS + 1}" if len(panels) > _PANEL_ROWS else ""
    return Picture(
        name=f"{view.op}_{view.x}_{dtype}{number}",
        title=f"{view.op}: {unit} against {view.words}, {dtype}",
        alt=f"Lines of {unit} against {view.words} of {view.op} in {dtype}, one for each candidate,"
        f" in panels for {words.listed([panel.title for panel in shown])}",
        how="Higher is faster. Thick warm lines are gptkernels, thin ones are others; the dashed "
        "line is the rate that this machine reaches. A dot is a shape's median time; a line breaks "
        "where its candidate was not timed.",
        draw=functools.partial(_draw, view, shown, candidates),
    )


def _panels(view: View, rows: list[Row]) -> Iterator[Panel]:
    def name(row: Row) -> str:
        fixed = [_named(key, row["sizes"][key]) for key in view.panel if key in row["sizes"]]
        return " ".join(filter(None, [*fixed, row.get("series", "")]))

    for title, group in grouped(rows, name).items():
        yield from _parted(view.x, title, group, view.split)


def _parted(x: str, title: str, rows: list[Row], split: tuple[str, ...]) -> list[Panel]:
    """Panels of more than one x, in each of which a shape is known by its x where `split` can do
    that. Of several ways to part the rows, the one that keeps the most of them comes first, and of
    the others the panels that show more shapes."""
    at = {row["shape"]: row["sizes"][x] for row in rows}
    several = len(set(at.values())) > 1
    if not several or not split or len(set(at.values())) == len(at):
        return [Panel(title, rows)] if several else []
    ways = [_parted_by(key, x, title, rows, split) for key in split]
    ways.sort(key=lambda panels: -sum(len(panel.rows) for panel in panels))
    shown: set[str] = set()
    kept = []
    for panel in (panel for way in ways for panel in way):
        shapes = {row["shape"] for row in panel.rows}
        if not shapes <= shown:
            kept.append(panel)
            shown |= shapes
    return kept


def _size(row: Row, key: str) -> int | None:
    sizes = row["sizes"]
    if key == _TOKENS:
        tokens: int = sizes["B"] * sizes["T"]
        return tokens
    found: int | None = sizes.get(key)
    return found


def _named(size: str, value: int | None) -> str:
    """A size as shapes spell it: "D64", "rows 512"."""
    return f"{size}{' ' * (len(size) > 2)}{value}"


def _parted_by(
    key: str, x: str, title: str, rows: list[Row], split: tuple[str, ...]
) -> list[Panel]:
    rest = tuple(other for other in split if other != key)
    groups = grouped(rows, lambda row: _size(row, key))
    return [
        panel
        for value, group in groups.items()
        for panel in _parted(
            x, f"{title} {_named(key, value)}".strip() if len(groups) > 1 else title, group, rest
        )
    ]


def _draw(view: View, panels: list[Panel], candidates: Candidates, look: Look) -> Figure:
    rows = [row for panel in panels for row in panel.rows]
    directions = list(grouped(rows, lambda row: row["direction"]))
    top = max(row[view.rate] for row in rows)
    scale, unit = _unit(view, top)
    parting = " · " if len(directions) < 3 else "\n"  # three panels leave no room for one line
    fits = False
    drawn = figure(look, 0.9 + 2.35 * len(panels))
    grid = drawn.subplots(len(panels), len(directions), squeeze=False)
    for panel, line in zip(panels, grid, strict=True):
        for direction, axes in zip(directions, line, strict=True):
            shown = [row for row in panel.rows if row["direction"] == direction]
            if not shown:
                axes.remove()
                continue
            fits |= _lines(axes, view, shown, candidates, look, scale)
            axes.set_xlabel(view.words)
            axes.set_ylabel(unit)
            title = parting.join(filter(None, (panel.title, direction)))
            dress(axes, look, title, len(directions))
    impls = {row["impl"] for row in rows}
    handles = [
        Line2D([], [], **candidate.line(look))
        for name, candidate in candidates.items()
        if name in impls
    ]
    if fits:
        handles.append(Line2D([], [], label="ceiling", **_ceiling_line(look)))
    legend(drawn, look, handles)
    return drawn


def _lines(
    axes: Axes, view: View, rows: list[Row], candidates: Candidates, look: Look, scale: float
) -> bool:
    """Draws one panel. Returns whether the ceiling is a line on it."""
    top = 0.0
    xs = sorted({row["sizes"][view.x] for row in rows})
    for impl, group in grouped(rows, lambda row: row["impl"]).items():
        points = _medians(view.x, view.rate, group, scale)
        top = max(top, *points.values())
        # A line breaks where its candidate was not timed.
        axes.plot(xs, [points.get(x, math.nan) for x in xs], **candidates[impl].line(look))
    ceiling = _medians(view.x, view.ceiling, rows, scale)
    fits = bool(ceiling) and max(ceiling.values()) <= _FITS * top
    if fits:
        top = max(top, *ceiling.values())
        axes.plot(list(ceiling), list(ceiling.values()), **_ceiling_line(look))
    elif ceiling:
        high = text.byte_rate if view.rate == "bytes_per_s" else text.flop_rate
        axes.text(
            0.02,
            0.98,
            f"ceiling {high(statistics.median(ceiling.values()) * scale)}, above this panel",
            transform=axes.transAxes,
            va="top",
            color=look.soft,
            fontsize=SMALL,
        )
        top *= 1.08
    axes.set_ylim(0, 1.08 * top)
    axes.set_xscale("log", base=2)
    axes.set_xlim(xs[0] / 1.25, xs[-1] * 1.25)
    axes.set_xticks(_apart(xs), [_short(x) for x in _apart(xs)])
    axes.minorticks_off()
    return fits


def _ceiling_line(look: Look) -> dict[str, Any]:
    return {"color": look.soft, "linestyle": "--", "linewidth": 1.2}


def _medians(x: str, key: str, rows: list[Row], scale: float) -> dict[int, float]:
    """x -> the median of the rows' values there."""
    known = [row for row in rows if row.get(key) is not None]
    at = grouped(known, lambda row: row["sizes"][x])
    return {x: statistics.median(row[key] for row in at[x]) / scale for x in sorted(at)}


def _unit(view: View, top: float) -> tuple[float, str]:
    if view.rate == "bytes_per_s":
        return 1e9, "GB/s"
    return (1e12, "TFLOP/s") if top >= 1e12 else (1e9, "GFLOP/s")


def _apart(xs: list[int]) -> list[int]:
    """Those of the sorted sizes whose labels have room beside each other."""
    gap = max(1.0, math.log2(xs[-1] / xs[0])) / 7
    kept = xs[:1]
    for x in xs[1:]:
        if math.log2(x / kept[-1]) >= gap:
            kept.append(x)
    return kept


def _short(x: int) -> str:
    return f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else f"{x}"
