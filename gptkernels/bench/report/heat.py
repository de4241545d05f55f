"""Where we are faster and where slower than the best peer: a map of every case."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from gptkernels.bench.case import BACKWARD, BOTH, FORWARD
from gptkernels.bench.report import words
from gptkernels.bench.report.looks import (
    NORMAL,
    SMALL,
    Look,
    dress,
    figure,
    legend,
    lines_of,
    literal,
)
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import best_of_ours, grouped
from gptkernels.bench.results import Row

_SHAPES = 40
# Ops of fewer shapes share a picture.
_FEW = 4
_NAMED = 3  # ops that a title names

_SIGNS = {"slower": "▼ ", "same": "", "faster": "▲ "}

Colour = tuple[float, float, float]


def pictures(rows: Sequence[Row]) -> Iterator[Picture]:
    """A picture for each op, several for one of many shapes; one for all ops of few shapes."""
    compared = [row for row in best_of_ours(rows) if row.get("peer_ratio") is not None]
    maps: dict[str, list[Row]] = {}
    few: list[Row] = []
    for op, group in grouped(compared, lambda row: row["op"]).items():
        if len(grouped(group, _shape)) < _FEW:
            few += group
        else:
            maps[op] = group
    if few:
        maps["ops of few shapes"] = few
    for name, group in maps.items():
        shapes = list(grouped(group, _shape))
        parts = [shapes[i : i + _SHAPES] for i in range(0, len(shapes), _SHAPES)]
        for number, part in enumerate(parts, 1):
            several = len(parts) > 1
            shown = [row for row in group if _shape(row) in part]
            ops = list(grouped(shown, lambda row: row["op"]))
            yield Picture(
                name=f"peers_{name.replace(' ', '_')}" + (f"_{number}" if several else ""),
                title=f"{words.listed(ops) if len(ops) <= _NAMED else name}: beside the best peer"
                + (f", part {number} of {len(parts)}" if several else ""),
                alt=f"Heat map of {words.listed(ops)}: the best peer's time over ours, a row for "
                f"each of {words.count(len(part), 'shape')}, a column for each dtype and direction",
                how="The best peer's time over ours: above 1 gptkernels is faster, below 1 slower. "
                "Grey cells lie within the spread of the measurement; a deeper colour is a larger "
                "difference, and full colour is 2×.",
                draw=functools.partial(_draw, shown),
            )


def _draw(rows: list[Row], look: Look) -> Figure:
    def column(row: Row) -> str:
        return f"{row['dtype']}\n{row['direction']}".replace("+", "+\n")

    shapes = list(grouped(rows, _shape))
    several = len({op for op, _ in shapes}) > 1
    columns = list(grouped(sorted(rows, key=_dtype_and_direction), column))
    cells = {(_shape(row), column(row)): row for row in rows}
    labels = [literal(f"{op} {shape}" if several else shape) for op, shape in shapes]
    height = max(0.27, 0.04 + 0.14 * max(map(lines_of, labels)))  # inches of a row
    drawn = figure(look, 1.1 + height * len(shapes))
    axes = drawn.subplots()
    dress(axes, look)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    back = to_rgb(look.back)
    colours = [
        [_colour(cells[s, c], look) if (s, c) in cells else back for c in columns] for s in shapes
    ]
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    for i, shape in enumerate(shapes):
        for j, name in enumerate(columns):
            if (shape, name) in cells:
                row = cells[shape, name]
                axes.text(
                    j,
                    i,
                    f"{_SIGNS[row['peer_verdict']]}{row['peer_ratio']:.2f}",
                    ha="center",
                    va="center",
                    fontsize=NORMAL,
                    fontweight="bold" if row["peer_verdict"] == "slower" else "normal",
                    color=_readable_on(colours[i][j]),
                )
    # Lines of the background part the cells.
    axes.hlines(
        [i - 0.5 for i in range(len(shapes) + 1)], -0.5, len(columns) - 0.5, look.back, lw=2
    )
    axes.vlines(
        [j - 0.5 for j in range(len(columns) + 1)], -0.5, len(shapes) - 0.5, look.back, lw=2
    )
    axes.set_yticks(range(len(shapes)), labels)
    axes.set_xticks(range(len(columns)), [literal(name) for name in columns])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=SMALL)
    names = {"gptkernels slower": look.bad, "within the spread": look.same, "faster": look.good}
    legend(drawn, look, [Patch(color=colour, label=name) for name, colour in names.items()])
    return drawn


def _shape(row: Row) -> tuple[str, str]:
    return row["op"], row["shape"]


def _dtype_and_direction(row: Row) -> tuple[str, int]:
    return row["dtype"], (FORWARD, BACKWARD, BOTH).index(row["direction"])


def _colour(row: Row, look: Look) -> Colour:
    if row["peer_verdict"] == "same":
        return to_rgb(look.same)
    strength = 0.5 + 0.5 * min(1.0, abs(math.log2(row["peer_ratio"])))
    full = to_rgb(look.bad if row["peer_verdict"] == "slower" else look.good)
    mixed = [
        strength * f + (1 - strength) * b for f, b in zip(full, to_rgb(look.back), strict=True)
    ]
    return mixed[0], mixed[1], mixed[2]


def _readable_on(colour: Colour) -> str:
    """Black or white, whichever has the higher contrast; by WCAG 2 one always has 4.5."""
    luminance = _luminance(colour)
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"


def _luminance(colour: Colour) -> float:
    """By WCAG 2, from 0 of black to 1 of white."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
