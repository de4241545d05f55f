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
from gptkernels.bench.results import Results, Row
from gptkernels.core import ceilings

Wanted = Callable[[str], bool]


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
    there = {_key(row) for row in results.rows}
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    for step in steps:
        for case in step.cases(device, impls):
            if _key_of(case) in there:
                continue
            if ends is not None and time.monotonic() > ends:
                return
            rows = _measured(case, device, peers, level)
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
    wanted = {_key(row) for row in rows}
    ops = {op for op, *_ in wanted}
    results = Results()
    for step in steps:
        if step.op in ops:
            cases = (case for case in step.cases(device, impls) if _key_of(case) in wanted)
            for case in cases:
                results.add(*_measured(case, device, peers, level))
    return results.rows


def _measured(case: Case, device: torch.device, peers: Wanted, level: str) -> list[Row]:
    chosen = {name: make for name, make in case.peers.items() if peers(name)}
    case = dataclasses.replace(case, peers=chosen)
    return measure.measure(case, device=device, budget_s=BUDGET_S[level])


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["shape"], row["dtype"], row["direction"]


def _key_of(case: Case) -> tuple[str, str, str, str]:
    return case.op, case.shape, str(case.dtype).removeprefix("torch."), case.direction
