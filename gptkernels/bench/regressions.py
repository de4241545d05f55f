"""A run beside an older one: what became slower.

Two runs never see the same machine: clocks drift and neighbours come and go. So a row's ratio to
plain PyTorch, which was timed in turns with it, is compared, and its time only where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gptkernels.bench.measure import spread
from gptkernels.bench.results import Row, case_of
from gptkernels.core.choice import IMPLEMENTATIONS

TOLERATED = 0.05


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows comparable."""
    return *case_of(row), row["impl"]


def found(old: Sequence[Row], new: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yields what is slower in `new` by more than 5% and by more than the spread of the two, and
    what no longer runs: the new row, with "was" and "is" (the ratios, or None), "change" (2 is
    twice as slow) and "within" (how far that is known), of our implementations alone."""
    before = {key(row): row for row in old if _ours(row) and row["time_s"] is not None}
    for row in new:
        was = before.get(key(row))
        if was is None:
            continue
        if row["time_s"] is None:
            gone = {"was": was.get("ratio"), "is": None, "change": math.inf, "within": 0.0}
            yield row | gone
            continue
        change, within = _change(was, row)
        if change - 1 > max(TOLERATED, within):
            ratios = {"was": was.get("ratio"), "is": row.get("ratio")}
            yield {**row, **ratios, "change": change, "within": within}


def confirmed(slower: Sequence[Row], old: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """Those that are slower once more, or were not measured again: one measurement in a few hundred
    is off by chance."""
    still = {key(row) for row in found(old, again)}
    measured = {key(row) for row in again}
    return [row for row in slower if key(row) in still or key(row) not in measured]


def compared(old: Sequence[Row], new: Sequence[Row]) -> int:
    """How many rows of ours are in both."""
    before = {key(row) for row in old if _ours(row) and row["time_s"] is not None}
    return sum(key(row) in before for row in new)


def _ours(row: Row) -> bool:
    # Files from before peers were measured say nothing of the kind.
    return bool(row.get("kind") == "ours" or row["impl"] in (*IMPLEMENTATIONS, "auto"))


def _change(was: Row, row: Row) -> tuple[float, float]:
    if was.get("ratio") and row.get("ratio"):
        known = (found.get("ratio_spread", _spread(found)) for found in (was, row))
        return was["ratio"] / row["ratio"], math.hypot(*known)
    return row["time_s"] / was["time_s"], math.hypot(_spread(row), _spread(was))


def _spread(row: Row) -> float:
    return spread(row) if "high_s" in row else 0.0
