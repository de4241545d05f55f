"""The memory that a call takes, beside plain PyTorch's and the fastest peer's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from gptkernels.bench.report import bars, words
from gptkernels.bench.report.looks import Candidates, Look, figure
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import case_of, grouped, timed
from gptkernels.bench.results import Row

_CASES = 12


def pictures(rows: Sequence[Row], candidates: Candidates) -> Iterator[Picture]:
    """One picture, where a case has our memory and another's."""
    cases = grouped((r for r in timed(rows) if r.get("peak_bytes") is not None), case_of)
    compared = {
        "\n".join((f"{op} {direction}", f"{shape} {dtype}")): shown
        for (op, shape, dtype, direction), case in cases.items()
        if len(shown := _fastest_of_each_kind(case)) > 1 and "ours" in shown
    }
    largest = sorted(
        compared.items(), key=lambda case: max(r["peak_bytes"] for r in case[1].values())
    )[: -_CASES - 1 : -1]
    if largest:
        groups = {
            label: {row["impl"]: float(row["peak_bytes"]) for row in shown.values()}
            for label, shown in largest
        }
        yield Picture(
            name="memory",
            title="Memory that a call takes",
            alt="Bars of the peak memory of gptkernels, plain PyTorch and the fastest peer, for "
            f"the {words.count(len(groups), 'case')} that take the most",
            how="The most memory that a call takes beside its inputs; shorter is better. Ours is "
            "the fastest of our implementations, and the peer is the fastest one.",
            draw=functools.partial(_draw, groups, candidates),
        )


def _fastest_of_each_kind(case: list[Row]) -> dict[str, Row]:
    kinds = grouped(case, lambda row: row["kind"])
    return {
        kind: min(kinds[kind], key=lambda row: row["time_s"])
        for kind in ("ours", "baseline", "peer")
        if kind in kinds
    }


def _draw(groups: bars.Groups, candidates: Candidates, look: Look) -> Figure:
    drawn = figure(look, 0.6 + bars.height(groups))
    bars.draw(drawn.subplots(), groups, candidates, look, words.size)
    bars.key(drawn, [groups], candidates, look)
    return drawn
