"""What `gptkernels tune` prints."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from gptkernels.bench.text import seconds as said_seconds
from gptkernels.tuning.explanation import Explanation, of_entry, said
from gptkernels.tuning.promise import Kept
from gptkernels.tuning.supervisor import Outcome
from gptkernels.tuning.tuner import Report

_BUSY = 0.8  # of the processors


def classes(count: int) -> str:
    """So many classes, in words."""
    return "1 class" if count == 1 else f"{count} classes"


def busy() -> list[str]:
    """What to say of times that are taken now where other programs keep the processors busy."""
    if not hasattr(os, "getloadavg"):
        return []
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load < _BUSY * cpus:
        return []
    return [f"the machine was busy (load {load:.1f}, {cpus} CPUs): tune again when it is idle"]


def outcome(found: Outcome) -> Iterator[str]:
    """A class as it was measured: what wins, by how much, and what may not be chosen."""
    yield str(found.key)
    if found.entry is None:
        yield f"  not measured: {found.why}"
    else:
        for explanation in of_entry(found.entry):
            yield f"  {_winner(explanation)}"
    for way, why in found.refused.items():
        yield f"  {way} refused: {why}"


def foot(report: Report, took: float) -> Iterator[str]:
    """The whole run."""
    where = f", kept in {report.path}" if report.path else ", for this process alone"
    yield f"{classes(len(report.entries))} measured in {took:.0f} s{where}"
    if report.left:
        yield f"No time was left for {len(report.left)}: a larger --seconds measures them too"
        for key in report.left:
            yield f"  {key}"
    if report.entries:
        yield "gptkernels tune --explain says why; --prove 200 puts it to the test"


def explained(found: Explanation) -> Iterator[str]:
    """A choice with all that lost."""
    yield str(found.key)
    yield f"  {_winner(found)}"
    if found.error is not None and found.limit:
        yield f"    its error against fp64 is {found.error / found.limit:.0%} of the limit"
    if found.origin != "here":
        yield f"    measured on {found.origin}"
    for way, why in found.others.items():
        yield f"    not {way}: {why}"


def row(found: Explanation) -> dict[str, Any]:
    """A choice as JSON."""
    return {
        "class": found.key.as_dict(),
        "sizes": found.sizes,
        "way": found.way,
        "time_s": found.seconds,
        "pytorch_s": found.pytorch_s,
        "error": found.error,
        "limit": found.limit,
        "others": found.others,
        "origin": found.origin,
    }


def proved(points: Sequence[Kept]) -> Iterator[str]:
    """The promise over all points."""
    kept = sum(point.is_kept for point in points)
    far = sum(point.is_broken for point in points)
    yield (
        f"{kept} of {len(points)} calls ({kept / len(points):.1%}) are within 3% or 2 us of the "
        f"best; {far} are more than 8% behind"
    )
    yield f"median: {statistics.median(p.excess for p in points):+.1%} of the best's time"


def _winner(found: Explanation) -> str:
    beside = f"{found.margin:.2f} times as fast as PyTorch" if found.margin > 1 else "PyTorch's"
    return f"up to {said(found.sizes)}: {found.way}, {said_seconds(found.seconds)}, {beside}"
