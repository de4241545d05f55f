"""The benchmarks' cases under pytest-benchmark: `pytest benchmarks --benchmark-only`.

pytest-benchmark runs one benchmark after the other, so that clocks which drift would favour some.
Here all candidates of a case are timed in turns when the first of them is asked for, by
`gptkernels.bench.timing`; each test then hands its samples over by a clock that replays them.
`--benchmark-save` and `--benchmark-compare` work as ever. Peers that torch.compile makes, and whole
models, are left to `gptkernels bench`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptkernels.bench import OPERATORS, cases_of, timing
from gptkernels.bench.case import BASELINE, Case
from gptkernels.core.choice import IMPLEMENTATIONS

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Replay:
    """A clock, and a call that moves it on by one sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += self.samples.pop(0) if self.samples else 0.0


_CLOCK = _Replay()


class _Group:
    """One case: its candidates' samples, taken in turns once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.makers = {BASELINE: case.plain, **case.ours}

    @functools.cached_property
    def timings(self) -> dict[str, timing.Timing]:
        calls = {name: make() for name, make in self.makers.items()}
        return timing.compare(calls, device=_DEVICE, budget_s=0.3)


def _tests() -> Iterator[Any]:
    for op in OPERATORS:
        for case in cases_of(op, _DEVICE, IMPLEMENTATIONS, "quick"):
            name = f"{op} {case.shape} {case.dtype} {case.direction}"
            group = _Group(case)
            for candidate in group.makers:
                mark = pytest.mark.benchmark(group=name, timer=_CLOCK)
                yield pytest.param(group, candidate, id=f"{name} [{candidate}]", marks=mark)


@pytest.mark.parametrize(("group", "candidate"), list(_tests()))
def test_speed(group: _Group, candidate: str, benchmark: Callable[..., Any]) -> None:
    samples = group.timings[candidate].samples
    _CLOCK.samples = list(samples)
    replay: Any = benchmark
    replay.pedantic(_CLOCK.call, rounds=len(samples))
