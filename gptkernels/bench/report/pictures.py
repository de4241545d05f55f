"""All figures of a report, in the order of the page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from gptkernels.bench.report import heat, lines, memory, models, roofline
from gptkernels.bench.report.looks import LOOKS, candidates
from gptkernels.bench.report.picture import Picture


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
    pngs = {}
    for look in LOOKS:
        png = io.BytesIO()
        picture.draw(look).savefig(png, format="png")
        pngs[f"{picture.name}_{look.name}.png"] = png.getvalue()
    return pngs
