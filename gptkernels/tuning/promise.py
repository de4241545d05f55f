"""The promise of impl="auto", put to the test on whatever machine this is: between the sizes that
were measured too, it is no slower than the best candidate and plain PyTorch by more than noise.

A point is a call of random sizes of a random class of the table, eager. Its time by "auto", with
all that choosing costs, stands beside that of each way that may be chosen there and of plain
PyTorch, written as users write it. A point is kept where "auto" is within 3% or 2 us of the best. A
point that is not is timed again, twice: one measurement of many is off by chance.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench import timing
from gptkernels.core.tuned import EAGER, Entry, Table, ends
from gptkernels.core.tuned import position as position_of
from gptkernels.truth import baseline
from gptkernels.tuning.contest import whole_groups
from gptkernels.tuning.explanation import is_of_these_threads
from gptkernels.tuning.problems import problem
from gptkernels.tuning.problems.problem import Problem, listed
from gptkernels.tuning.trial import AUTO, Runner, is_pytorchs

SHARE, WITHIN, WITHIN_S, MOST = 0.95, 0.03, 2e-6, 0.08
PLAIN = "plain PyTorch"
_BUDGET_S, _AGAIN, _AGAIN_S = 0.15, 2, 0.6


@dataclass(frozen=True)
class Kept:
    """A point: what "auto" took, and the best of the others, in seconds."""

    entry: Entry
    sizes: dict[str, int]
    way: str
    auto_s: float
    best: str
    best_s: float

    @property
    def excess(self) -> float:
        """By which share "auto" takes longer."""
        return self.auto_s / self.best_s - 1

    @property
    def is_kept(self) -> bool:
        """Whether the promise holds here."""
        return self.excess <= WITHIN or self.auto_s - self.best_s <= WITHIN_S

    @property
    def is_broken(self) -> bool:
        """Whether it is further off than any point may be."""
        return self.excess > MOST and self.auto_s - self.best_s > WITHIN_S

    def __str__(self) -> str:
        sizes = " ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return (
            f"{self.entry.key.op} {self.entry.key.direction} {sizes}: {self.way} "
            f"{self.auto_s * 1e6:.1f} us, {self.best} {self.best_s * 1e6:.1f} us"
        )


def holds(points: Sequence[Kept]) -> bool:
    """Whether the promise holds over all points."""
    kept = sum(point.is_kept for point in points)
    return kept >= SHARE * len(points) and not any(point.is_broken for point in points)


def points(table: Table, count: int, seed: int) -> Iterator[Kept]:
    """Measures so many points of the table's eager classes. Raises ValueError where it has none."""
    entries = [
        entry
        for entry in table.entries.values()
        if entry.key.mode == EAGER and is_of_these_threads(entry.key)
    ]
    if not entries:
        raise ValueError(
            "nothing was measured on this machine with so many threads: run gptkernels tune first"
        )
    chance = random.Random(seed)
    for _ in range(count):
        entry = chance.choice(entries)
        yield _measure(entry, _sizes(entry, chance))


def _sizes(entry: Entry, chance: random.Random) -> dict[str, int]:
    """Random sizes in the octaves of a class, evenly by their logarithms."""
    found = {}
    for axis, k in entry.key.buckets:
        least, largest = ends(k)
        found[axis] = round(least * (largest / least) ** chance.random())
    return whole_groups(entry.key, found)


def _measure(entry: Entry, sizes: dict[str, int]) -> Kept:
    made = problem(entry.key, sizes)
    runner = Runner(entry.key, made)
    way = entry.way(position_of(sizes.values()))
    others = _others(entry, runner, made)
    calls = {AUTO: runner.call(AUTO), **others}
    kept = _timed(entry, sizes, way, calls, made.device, _BUDGET_S)
    for _ in range(_AGAIN):
        if kept.is_kept:
            break
        again = {AUTO: calls[AUTO], kept.best: calls[kept.best]}
        kept = _timed(entry, sizes, way, again, made.device, _AGAIN_S)
    return kept


def _timed(
    entry: Entry,
    sizes: dict[str, int],
    way: str,
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    budget_s: float,
) -> Kept:
    taken = timing.compare(calls, device=device, budget_s=budget_s, max_rounds=300, warm_ups=1)
    found = {name: t.whole for name, t in taken.items()}
    best = min((name for name in found if name != AUTO), key=lambda name: found[name].time_s)
    return Kept(entry, sizes, way, found[AUTO].time_s, best, found[best].time_s)


def _others(entry: Entry, runner: Runner, made: Problem) -> dict[str, Callable[[], Any]]:
    """What may be chosen: PyTorch's, and what beat it somewhere in the class."""
    held = {way for point in entry.points for way in point["holds"]}
    measured = {way for point in entry.points for way in point["times"]}
    ways = [way for way in measured if is_pytorchs(way) or way in held]
    calls = {way: runner.call(way) for way in sorted(ways) if way not in entry.refused}
    if not made.options.get("dropout_p"):
        calls[PLAIN] = _plain(made)
    return calls


def _plain(made: Problem) -> Callable[[], Any]:
    """Eager PyTorch, in the inputs' own dtypes."""
    function = getattr(baseline, made.op)
    lacking = ("deterministic", "recompute")  # what changes no result
    options = {name: value for name, value in made.options.items() if name not in lacking}
    leaves = made.leaves()

    def forward() -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            if made.autocast:
                stack.enter_context(torch.autocast(made.device.type, made.narrow))
            return listed(function(**leaves, **options))

    def without_gradients() -> Any:
        with torch.no_grad():
            return forward()

    return (lambda: made.backward(leaves, forward())) if made.training else without_gradients
