"""All figures of a report, in the order of the page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gptkernels.bench.report import heat, lines, memory, models, roofline
from gptkernels.bench.report.looks import LOOKS, candidates
from gptkernels.bench.report.picture import Picture

_COLOURS = 128


def pictures(content: dict[str, Any]) -> Iterator[Picture]:
    """The pictures that the rows of a results file suffice for."""
    rows = content["rows"]
    known = candidates(rows)
    yield from heat.pictures(rows)
    yield from lines.pictures(rows, known)
    yield from roofline.pictures(rows, content.get("ceilings") or {})
    yield from memory.pictures(rows, known)
    yield from models.pictures(rows, known)


def files(picture: Picture) -> dict[str, bytes]:
    """The picture's PNGs by their names, the light one first."""
    return {f"{picture.name}_{look.name}.png": _png(picture.draw(look)) for look in LOOKS}


def _png(drawn: Figure) -> bytes:
    """With a palette instead of all colours, which makes it a third of the size."""
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    png = io.BytesIO()
    # Maximum coverage keeps the colours of thin lines, and the k-means those of large areas.
    few = image.quantize(
        _COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
    )
    few.save(png, format="png", optimize=True)
    return png.getvalue()
