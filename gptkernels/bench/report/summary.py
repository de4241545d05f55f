"""What a benchmark says in few words: how our best kernel does, and where it loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from gptkernels.bench.results import Row, case_of

T = TypeVar("T")

KERNELS = ("triton", "cuda", "cpu", "auto")
"""Implementations that are kernels of ours; "auto" takes one of them."""


@dataclass(frozen=True)
class Tally:
    """Cases beside one rival: the geometric mean of the ratios, and the verdicts counted."""

    mean: float
    faster: int
    same: int
    slower: int

    @property
    def cases(self) -> int:
        """How many cases the mean is of."""
        return self.faster + self.same + self.slower


@dataclass(frozen=True)
class Mean:
    """The cases of one op, dtype and direction; above 1 `best_of_ours` is faster.

    `pytorch` is beside plain PyTorch, `peer` beside each case's fastest other candidate; None where
    no case has it.
    """

    op: str
    dtype: str
    direction: str
    cases: int
    pytorch: Tally | None
    peer: Tally | None


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The items by their key, both in the order of their first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in rows if row.get("time_s") is not None]


def best_of_ours(rows: Iterable[Row]) -> list[Row]:
    """One row for each case that any of our implementations was timed on: the fastest kernel.

    "torch" and "torch.compile of ours" are PyTorch's own operators behind our API: where they beat
    a kernel, they would hide that a peer does too. They count only where no kernel ran.
    """
    ours = (row for row in timed(rows) if row["kind"] == "ours")
    return [_best(case) for case in grouped(ours, case_of).values()]


def geometric_means(rows: Iterable[Row]) -> list[Mean]:
    """How the best of ours does beside plain PyTorch and the best peer, by op, dtype and
    direction."""

    def kind(row: Row) -> tuple[str, str, str]:
        return row["op"], row["dtype"], row["direction"]

    return [
        Mean(op, dtype, direction, len(group), _tally(group, ""), _tally(group, "peer_"))
        for (op, dtype, direction), group in grouped(best_of_ours(rows), kind).items()
    ]


def losing(rows: Iterable[Row]) -> list[Row]:
    """Our best rows of the cases where another candidate is faster beyond the spread, the worst
    first."""
    slower = (row for row in best_of_ours(rows) if row.get("peer_verdict") == "slower")
    return sorted(slower, key=lambda row: row["peer_ratio"])


def without_ours(rows: Iterable[Row]) -> list[list[Row]]:
    """The timed rows of each case that others ran and none of our implementations did."""
    cases = grouped(timed(rows), case_of).values()
    return [case for case in cases if all(row["kind"] != "ours" for row in case)]


def failed(rows: Iterable[Row]) -> list[Row]:
    """The rows that ended in an error or a wrong result, where a time was expected."""
    return [row for row in rows if row.get("failed")]


def _best(case: list[Row]) -> Row:
    kernels = [row for row in case if row["impl"] in KERNELS]
    return min(kernels or case, key=lambda row: row["time_s"])


def _tally(rows: list[Row], beside: str) -> Tally | None:
    compared = [row for row in rows if row.get(f"{beside}ratio") is not None]
    if not compared:
        return None
    mean = math.exp(math.fsum(math.log(row[f"{beside}ratio"]) for row in compared) / len(compared))
    verdicts = [row[f"{beside}verdict"] for row in compared]
    return Tally(mean, *(verdicts.count(name) for name in ("faster", "same", "slower")))
