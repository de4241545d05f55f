"""A whole run: steps one after the other into a results file, as far as time allows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from gptkernels.bench import BUDGET_S, Step, measure
from gptkernels.bench.case import Case
from gptkernels.bench.peers import packages
from gptkernels.bench.results import Results, Row, case_of
from gptkernels.core import ceilings

Wanted = Callable[[str], bool]
NO_PEERS = "none"


def head(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """What a results file says of the machine, whose ceilings it measures for these dtypes, and of
    the peers."""
    ceilings.measure(device, dtypes)
    return {"ceilings": ceilings.known(device), "peers": packages.found()}


def run(
    steps: Iterable[Step],
    results: Results,
    *,
    device: torch.device,
    impls: Sequence[str],
    peers: Wanted,
    level: str = "default",
    minutes: float | None = None,
) -> Iterator[tuple[Step, list[Row]]]:
    """Measures what `results` does not have yet, and yields each step with the rows of each of its
    cases; an empty list where nothing is left to do for it.

    `peers` says of a name whether that peer takes part. Once `minutes` have passed, no further case
    is begun. Otherwise `results` is finished at the end.
    """
    there: dict[Any, set[str]] = {}
    for row in results.rows:
        there.setdefault(case_of(row), set()).add(row["impl"])
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    for step in steps:
        for case in step.cases(device, impls):
            case = _with(case, peers)
            if case.names <= there.get(_key(case), set()):
                continue
            if ends is not None and time.monotonic() > ends:
                return
            rows = measure.measure(case, device=device, budget_s=BUDGET_S[level])
            results.add(*rows)
            yield step, rows
        yield step, []
    results.finish()


def again(
    steps: Iterable[Step],
    rows: Sequence[Row],
    *,
    device: torch.device,
    impls: Sequence[str],
    peers: Wanted,
    level: str = "default",
) -> list[Row]:
    """Measures the cases of these rows once more, and returns all rows of them."""
    wanted = {case_of(row) for row in rows}
    ops = {op for op, *_ in wanted}
    results = Results()
    for step in steps:
        if step.op in ops:
            for case in step.cases(device, impls):
                if _key(case) in wanted:
                    case = _with(case, peers)
                    results.add(*measure.measure(case, device=device, budget_s=BUDGET_S[level]))
    return results.rows


def wanted_peers(patterns: Sequence[str], level: str) -> Wanted:
    """Whether a peer takes part, by its name: those that hold one of the patterns, in any case; by
    default all, but max-autotune, which takes minutes, in a full run alone.

    Raises ValueError for a pattern, other than "none", that no peer's name holds.
    """
    names = packages.names()
    for pattern in patterns:
        if pattern != NO_PEERS and not any(pattern.lower() in name.lower() for name in names):
            raise ValueError(f"no peer is called {pattern!r}; there are {', '.join(names)}")
    if patterns:
        return lambda name: any(pattern.lower() in name.lower() for pattern in patterns)
    return lambda name: level == "full" or "max-autotune" not in name


def _with(case: Case, peers: Wanted) -> Case:
    chosen = {name: make for name, make in case.peers.items() if peers(name)}
    return dataclasses.replace(case, peers=chosen)


def _key(case: Case) -> tuple[str, str, str, str]:
    return case.op, case.shape, str(case.dtype).removeprefix("torch."), case.direction
