"""The memory that a call takes, beside plain PyTorch's and peers', where ours stands worst."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from gptkernels.bench.report import bars, words
from gptkernels.bench.report.looks import Candidates, Look, figure
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.summary import best_of_ours, grouped, timed
from gptkernels.bench.results import Row, case_of

_CASES = 12


def pictures(rows: Sequence[Row], candidates: Candidates) -> Iterator[Picture]:
    """One picture, where a case has our memory and another's."""
    known = [row for row in timed(rows) if row.get("peak_bytes") is not None]
    cases = grouped((row for row in known if row["kind"] != "ours"), case_of)
    beside = [(row, cases[case_of(row)]) for row in best_of_ours(known) if case_of(row) in cases]
    worst = sorted(beside, key=lambda case: _share(*case), reverse=True)[:_CASES]
    if worst:
        groups = {
            f"{ours['op']} {ours['direction']}\n{ours['shape']} {ours['dtype']}": {
                row["impl"]: float(row["peak_bytes"]) for row in (ours, *_shown(others))
            }
            for ours, others in worst
        }
        cases_here = words.count(len(groups), "case")
        yield Picture(
            name="memory",
            title="Memory that a call takes",
            alt="Bars of the peak memory of gptkernels, plain PyTorch and peers, for the "
            f"{cases_here} where ours is the most beside the least of the others",
            how="The most memory that a call takes beside its inputs; shorter is better. Of "
            f"{words.count(len(beside), 'case')} these are the {len(groups)} where ours stands "
            "worst: the one with the most memory beside the least of the others comes first. The "
            "longest bar of each case has the same length: compare the bars of one case. Shown are "
            "our fastest kernel, plain PyTorch, the fastest peer, and the peer that takes the "
            "least, where that is another.",
            draw=functools.partial(_draw, groups, candidates),
        )


def _share(ours: Row, others: list[Row]) -> float:
    """Our memory over the least of the others; a call may take none."""
    return ours["peak_bytes"] / max(1, min(row["peak_bytes"] for row in others))


def _shown(others: list[Row]) -> list[Row]:
    peers = [row for row in others if row["kind"] == "peer"]
    chosen = [min(peers, key=lambda row: row[key]) for key in ("time_s", "peak_bytes") if peers]
    return [row for row in others if row["kind"] == "baseline" or row in chosen]


def _draw(groups: bars.Groups, candidates: Candidates, look: Look) -> Figure:
    drawn = figure(look, 0.2 + bars.height(groups))
    bars.draw(drawn.subplots(), groups, candidates, look, words.size)
    return drawn
