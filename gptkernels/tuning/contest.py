"""Which way wins a class of calls.

Ways are timed in turns at both ends of the class. A way of ours holds at an end where it is faster
than the best of PyTorch's there, by the 95% bound of the median ratio of a fresh run; so ties stay
with PyTorch. Of those that hold at both ends, and PyTorch's own, the class gets the one that is
nowhere far from the fastest. Where even that one is further away than `_NEAR`, the class is halved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.bench import timing
from gptkernels.core.tuned import EAGER, PYTORCH, TRAINING, Entry, Key, ends
from gptkernels.tuning import ways
from gptkernels.tuning.problems import problem
from gptkernels.tuning.trial import Refused, Runner, Trial, is_pytorchs

# A way that took so many times as long as the fastest in its trial is not timed further.
_FAR = 1.4
_NEAR = 1.03
_HALVINGS = 2
_SLOW_S, _ROUNDS, _FEW_ROUNDS = 0.05, 7, 5
_BUDGET_S = 0.25

Refusals = Mapping[str, str]


@dataclass
class Point:
    """What was measured at a position of a class: seconds of each way, and which of ours hold."""

    position: float
    sizes: dict[str, int]
    times: dict[str, timing.Timing] = field(default_factory=dict)
    holds: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """As an entry has it."""
        seconds = {way: [t.time_s, t.low_s, t.high_s] for way, t in self.times.items()}
        return {
            "position": self.position,
            "sizes": self.sizes,
            "times": seconds,
            "holds": sorted(self.holds),
        }

    @property
    def eligible(self) -> set[str]:
        """The ways that may be chosen here."""
        return {way for way in self.times if is_pytorchs(way) or way in self.holds}

    def regret(self, way: str) -> float:
        """How many times as long a way takes as the fastest of the eligible."""
        return self.times[way].time_s / min(self.times[w].time_s for w in self.eligible)


class Contest:
    """Measures one class. `refused` are ways that are left out from the start, and why; those that
    do not pass are added. `trying` is called with a way before anything of it runs. After `seconds`
    the class is not halved any more."""

    def __init__(
        self,
        key: Key,
        refused: Refusals,
        trying: Callable[[str], None] = lambda way: None,
        seconds: float = math.inf,
    ) -> None:
        self.key, self.refused, self._trying = key, dict(refused), trying
        self._ends = time.monotonic() + seconds
        self.errors: dict[str, tuple[float, float]] = {}

    def entry(self) -> Entry:
        """What was found. Raises NotImplementedError for a class that cannot be measured."""
        points = [self._point(position) for position in _distinct(self.key)]
        if len(points) == 1:
            ranges = [(1.0, self._best(points, points))]
        else:
            ranges = list(self._ranges(points, 0))
        ranges = list(_joined(ranges))
        measured = tuple(p.as_dict() for p in sorted(points, key=lambda p: p.position))
        return Entry(self.key, tuple(ranges), measured, self.refused, self.errors)

    def _ranges(self, points: list[Point], halvings: int) -> Iterator[tuple[float, str]]:
        """The winners between the last two points; further points are added at the front."""
        low, high = points[-2:]
        way = self._best([low, high], points)
        near = max(p.regret(way) for p in (low, high)) <= _NEAR
        if near or halvings == _HALVINGS or time.monotonic() > self._ends:
            yield high.position, way
            return
        middle = self._point((low.position + high.position) / 2)
        for pair in ([low, middle], [middle, high]):
            yield from self._ranges(pair, halvings + 1)
        points.insert(0, middle)

    def _best(self, at: list[Point], points: list[Point]) -> str:
        ways_here = set.intersection(*(point.eligible for point in at))

        def order(way: str) -> tuple[float, bool, bool]:
            regret = max(point.regret(way) for point in at)
            # Within the noise: PyTorch's kernels, and those by our op, whose memory is documented.
            return round(regret, 2), not is_pytorchs(way), way == PYTORCH

        return min(sorted(ways_here), key=order)

    def _point(self, position: float) -> Point:
        sizes = sizes_at(self.key, position)
        made = problem(self.key, sizes)
        runner = Runner(self.key, made)
        tried = self._trials(runner, ways.of(self.key, made.inputs))
        if not any(is_pytorchs(trial.way) for trial in tried):
            said = "; ".join(f"{way}: {why}" for way, why in self.refused.items())
            raise NotImplementedError(f"PyTorch itself cannot run it ({said})")
        return _timed(Point(position, sizes), tried, made.device)

    def _trials(self, runner: Runner, found: ways.Ways) -> list[Trial]:
        tried = [t for way in (*found.forward, *found.whole) if (t := self._trial(runner, way))]
        if self.key.direction == TRAINING and self.key.mode == EAGER:
            ours = [trial for trial in tried if trial.way in found.forward]
            backward = [trial for trial in ours if trial.way in found.backward]
            extra = [w for w in found.backward if w not in found.forward]
            for way in extra:  # tiles that the forward pass has not
                trial = self._trial(runner, f"{_plain(way)}+{way}")
                backward += [trial] if trial else []
            if ours and backward:
                first = min(ours, key=lambda trial: trial.forward_s).way
                second = min(backward, key=lambda trial: trial.backward_s).way.split("+")[-1]
                if first != second:
                    mixed = self._trial(runner, f"{first}+{second}")
                    tried += [mixed] if mixed else []
        return tried

    def _trial(self, runner: Runner, way: str) -> Trial | None:
        if way in self.refused:
            return None
        self._trying(way)
        try:
            trial = runner.trial(way)
        except torch.OutOfMemoryError as error:
            self.refused[way] = f"no memory is left: {_first_line(error)}"
            return None
        except Refused as error:
            self.refused[way] = str(error)
            return None
        except Exception as error:  # whatever a way raises, it is the way's fault alone
            self.refused[way] = f"{type(error).__name__}: {_first_line(error)}"
            return None
        worst = self.errors.get(way)
        if worst is None or trial.error / trial.limit > worst[0] / worst[1]:
            self.errors[way] = trial.error, trial.limit
        return trial


def sizes_at(key: Key, position: float) -> dict[str, int]:
    """The sizes of a call at a position between the ends of its class."""
    found = {}
    for axis, k in key.buckets:
        least, largest = ends(k)
        found[axis] = round(least * (largest / least) ** position)
    return whole_groups(key, found)


def whole_groups(key: Key, sizes: dict[str, int]) -> dict[str, int]:
    """These sizes as a call of the class has them: heads in whole groups, as many keys as queries
    where that is so for the class."""
    facts = dict(key.facts)
    if "heads" in sizes:
        group = facts["group"]
        sizes["heads"] = group * max(1, round(sizes["heads"] / group))
    if facts.get("square"):
        sizes["Tk"] = sizes["Tq"]
    return sizes


def _distinct(key: Key) -> list[float]:
    return [0.0, 1.0] if sizes_at(key, 0.0) != sizes_at(key, 1.0) else [1.0]


def _timed(point: Point, tried: Iterable[Trial], device: torch.device) -> Point:
    """Times the trials that are not far behind, twice: for the figures, and for what holds."""
    trials = {trial.way: trial for trial in tried}
    rough = {way: trial.forward_s + trial.backward_s for way, trial in trials.items()}
    fastest = min(rough.values())
    near = {way: trials[way].call for way, s in rough.items() if s <= _FAR * fastest}
    best_of_pytorch = min((way for way in rough if is_pytorchs(way)), key=lambda way: rough[way])
    near[best_of_pytorch] = trials[best_of_pytorch].call
    found = _compare(near, device, max(rough[way] for way in near))
    for way, seconds in rough.items():
        if way not in found:
            point.times[way] = timing.Timing(seconds, seconds, seconds, seconds, 1)
    point.times |= found
    others = [way for way in found if is_pytorchs(way)]
    best = min(others, key=lambda way: found[way].time_s)
    ours = [w for w in found if w not in others and found[w].time_s < found[best].time_s]
    if ours:
        again = {way: near[way] for way in (best, *ours)}
        fresh = _compare(again, device, max(found[way].time_s for way in again))
        for way in ours:
            pairs = zip(fresh[best].samples, fresh[way].samples, strict=True)
            if timing.Timing.of([b / w for b, w in pairs]).low_s > 1:
                point.holds.add(way)
    return point


def _compare(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, timing.Timing]:
    rounds = _FEW_ROUNDS if seconds > _SLOW_S else _ROUNDS
    return timing.compare(
        calls, device=device, budget_s=_BUDGET_S, min_rounds=rounds, max_rounds=31, warm_ups=1
    )


def _joined(ranges: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Neighbours with one winner are one range."""
    last: tuple[float, str] | None = None
    for end, way in ranges:
        if last is not None and last[1] != way:
            yield last
        last = end, way
    if last is not None:
        yield last


def _plain(way: str) -> str:
    return way.partition(":")[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
