"""Which way wins a class of calls.

Ways are timed in turns at both ends of the class. A way of ours holds at an end where it is faster
than the best of PyTorch's there, by the 95% bound of the median ratio of a fresh run; so ties stay
with PyTorch. Of those that hold at both ends, and PyTorch's own, the class gets the one that is
nowhere far from the fastest. Where even that one is further away than `_NEAR`, the class is halved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.bench import timing
from gptkernels.core import plans
from gptkernels.core.errors import first_line, in_a_line
from gptkernels.core.tuned import EAGER, PYTORCH, Entry, Key, bucket, ends
from gptkernels.tuning import ways
from gptkernels.tuning.problems import problem
from gptkernels.tuning.problems.problem import share
from gptkernels.tuning.trial import Refused, Runner, Trial, is_pytorchs

# A way that took so many times as long as the fastest in its trial is not timed further.
_FAR = 1.4
_NEAR = 1.03
_HALVINGS = 3
_FRESH_RUNS = 2
# Of nine samples the bound of the median leaves one out on either side, of twelve two: others may
# disturb so many.
_SLOW_S, _ROUNDS, _FEW_ROUNDS = 0.05, 12, 9
_BUDGET_S = 0.25
_MANY = 30  # runs of a way, to see whether it was that which raised

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


class Contest:
    """Measures one class. `refused` are ways that are left out from the start, and why; those that
    do not pass are added. `trying` is called with a way before anything of it runs, with "" before
    anything else; `in_turns` before several ways are timed together, with how long that takes,
    roughly. `alone`: each is timed alone before that, so that `trying` names what ends a process.
    After `seconds` the class is not halved any more."""

    def __init__(
        self,
        key: Key,
        refused: Refusals,
        trying: Callable[[str], None] = lambda way: None,
        seconds: float = math.inf,
        in_turns: Callable[[float], None] = lambda seconds: None,
        alone: bool = False,
    ) -> None:
        self.key, self.refused, self._trying = key, dict(refused), trying
        self._in_turns, self._alone = in_turns, alone
        self._ends = time.monotonic() + seconds
        self._points: list[Point] = []
        self.errors: dict[str, tuple[float, float]] = {}

    def entry(self) -> Entry:
        """What was found. Raises NotImplementedError for a class that cannot be measured."""
        points = [self._point(position) for position in _distinct(self.key)]
        parts = [points] if len(points) == 1 else list(self._parts(points, 0))
        # Only now: what is refused at any point is nowhere chosen.
        ranges = _joined((part[-1].position, self._best(part)) for part in parts)
        measured = tuple(p.as_dict() for p in sorted(self._points, key=lambda p: p.position))
        return Entry(self.key, tuple(ranges), measured, self.refused, self.errors)

    def _parts(self, ends: list[Point], halvings: int) -> Iterator[list[Point]]:
        """The ends of the parts that are not halved any more, between these two."""
        low, high = ends
        way = self._best(ends)
        near = max(self._regret(point, way) for point in ends) <= _NEAR
        if near or halvings == _HALVINGS or time.monotonic() > self._ends:
            yield ends
            return
        middle = self._point((low.position + high.position) / 2)
        for part in ([low, middle], [middle, high]):
            yield from self._parts(part, halvings + 1)

    def _best(self, at: list[Point]) -> str:
        ways_here = set.intersection(*(self._eligible(point) for point in at))
        if not any(is_pytorchs(way) for way in ways_here):
            raise self._impossible()

        def order(way: str) -> tuple[float, bool, bool]:
            regret = max(self._regret(point, way) for point in at)
            # Within the noise: PyTorch's kernels, and those by our op, whose memory is documented.
            return round(regret, 2), not is_pytorchs(way), way == PYTORCH

        return min(sorted(ways_here), key=order)

    def _eligible(self, point: Point) -> set[str]:
        """The ways that may be chosen at a point, by all that is known of them now."""
        return {way for way in point.eligible if self.refused.keys().isdisjoint(_parts_of(way))}

    def _regret(self, point: Point, way: str) -> float:
        """How many times as long a way takes as the fastest that may be chosen."""
        return point.times[way].time_s / min(point.times[w].time_s for w in self._eligible(point))

    def _impossible(self) -> NotImplementedError:
        said = "; ".join(f"{way}: {why}" for way, why in self.refused.items())
        return NotImplementedError(f"PyTorch itself cannot run it ({said})")

    def _point(self, position: float) -> Point:
        self._trying("")
        sizes = sizes_at(self.key, position)
        made = problem(self.key, sizes)
        runner = Runner(self.key, made)
        tried = self._trials(runner, ways.of(self.key, made.inputs))
        if not any(is_pytorchs(trial.way) for trial in tried):
            raise self._impossible()
        point = self._timed(Point(position, sizes), tried, made.device)
        self._points.append(point)
        return point

    def _trials(self, runner: Runner, found: ways.Ways) -> list[Trial]:
        names = {
            **{_of_both(way, found.backward, "{0}+{1}"): None for way in found.forward},
            **{_of_both(way, found.forward, "{1}+{0}"): None for way in found.backward},
            **dict.fromkeys(found.whole),
        }
        tried = [trial for name in names if (trial := self._trial(runner, name))]
        if not found.backward or self.key.mode != EAGER:
            return tried
        ours = [trial for trial in tried if trial.way not in found.whole]
        # The best of either pass together; each may have been tried with another one.
        first = _best(ours, found.forward, 0, lambda trial: trial.forward_s)
        second = _best(ours, found.backward, -1, lambda trial: trial.backward_s)
        if first and second:
            pair = first if first == second else f"{first}+{second}"
            if pair not in {trial.way for trial in tried}:
                mixed = self._trial(runner, pair)
                tried += [mixed] if mixed else []
        return tried

    def _trial(self, runner: Runner, way: str) -> Trial | None:
        if way in self.refused:
            return None
        self._trying(way)
        try:
            trial = runner.trial(way)
        except torch.OutOfMemoryError as error:
            self.refused[way] = f"no memory is left: {first_line(error)}"
            return None
        except Refused as error:
            self.refused[way] = str(error)
            return None
        except Exception as error:  # whatever a way raises, it is the way's fault alone
            self.refused[way] = in_a_line(error)
            _check_alive(runner.device)
            return None
        found = trial.error, trial.limit
        self.errors[way] = max(found, self.errors.get(way, found), key=lambda pair: share(*pair))
        return trial

    def _timed(self, point: Point, tried: Iterable[Trial], device: torch.device) -> Point:
        """Times the trials that are not far behind, twice: for the figures, and for what holds."""
        trials = {trial.way: trial for trial in tried if trial.way not in self.refused}
        if not any(map(is_pytorchs, trials)):
            raise self._impossible()
        try:
            return self._filled(point, trials, device)
        except Exception:
            _check_alive(device)
            before = len(self.refused)
            for way, trial in trials.items():
                self._refuse_if_it_raises(way, trial.call)
            if len(self.refused) == before:
                raise
        return self._timed(Point(point.position, point.sizes), trials.values(), device)

    def _refuse_if_it_raises(self, way: str, call: Callable[[], Any]) -> None:
        self._trying(way)
        try:
            for _ in range(_MANY):
                call()
        except Exception as error:
            self.refused[way] = f"{in_a_line(error)}, after some runs"

    def _filled(self, point: Point, trials: Mapping[str, Trial], device: torch.device) -> Point:
        rough = {way: trial.forward_s + trial.backward_s for way, trial in trials.items()}
        fastest = min(rough.values())
        near = {way: trials[way].call for way, s in rough.items() if s <= _FAR * fastest}
        best_of_pytorch = min(
            (way for way in rough if is_pytorchs(way)), key=lambda way: rough[way]
        )
        near[best_of_pytorch] = trials[best_of_pytorch].call
        found = self._compare(near, device, rough)
        for way, seconds in rough.items():
            if way not in found:
                point.times[way] = timing.Timing(seconds, seconds, seconds, seconds, 1)
        point.times |= found
        others = [way for way in found if is_pytorchs(way)]
        best = min(others, key=lambda way: found[way].time_s)
        ours = [w for w in found if w not in others and found[w].time_s < found[best].time_s]
        for _ in range(_FRESH_RUNS):
            ours = [way for way in ours if way not in point.holds]
            if not ours:
                break
            fresh = self._compare({way: near[way] for way in (best, *ours)}, device, rough)
            ratios = {way: _ratio(fresh[best], fresh[way]) for way in ours}
            point.holds |= {way for way, ratio in ratios.items() if ratio.low_s > 1}
            # What is far ahead, and yet not surely, was disturbed.
            ours = [way for way, ratio in ratios.items() if ratio.time_s > _NEAR]
        return point

    def _compare(
        self, calls: dict[str, Callable[[], Any]], device: torch.device, rough: dict[str, float]
    ) -> dict[str, timing.Timing]:
        slowest = max(rough[way] for way in calls)
        rounds = _FEW_ROUNDS if slowest > _SLOW_S else _ROUNDS
        how: dict[str, Any] = dict(
            device=device, budget_s=_BUDGET_S, min_rounds=rounds, max_rounds=31, warm_ups=1
        )
        if self._alone:
            for way, call in calls.items():
                self._trying(way)
                timing.compare({way: call}, **how)
        self._in_turns(_BUDGET_S + (rounds + 2) * sum(rough[way] for way in calls))
        found = timing.compare(calls, **how)
        # A graph's host time is that of the whole graph.
        eager = self.key.mode == EAGER
        return {way: t.whole if eager else t for way, t in found.items()}


def _ratio(other: timing.Timing, own: timing.Timing) -> timing.Timing:
    """How many times as long the other takes, of samples that were taken in turns."""
    pairs = zip(other.samples, own.samples, strict=True)
    return timing.Timing.of([b / a for b, a in pairs])


def sizes_at(key: Key, position: float) -> dict[str, int]:
    """The sizes of a call at a position between the ends of its class."""
    found = {}
    for axis, k in key.buckets:
        least, largest = ends(k)
        found[axis] = round(least * (largest / least) ** position)
    return whole_groups(key, found)


def whole_groups(key: Key, sizes: dict[str, int]) -> dict[str, int]:
    """These sizes as a call of the class has them: heads in whole groups, and as many keys as
    queries where that is so for the class, and nowhere else."""
    facts = dict(key.facts)
    if "heads" in sizes:
        group = facts["group"]
        least, largest = ends(bucket(sizes["heads"]))
        groups = min(max(round(sizes["heads"] / group), -(-least // group)), largest // group)
        sizes["heads"] = group * max(1, groups)  # one that is larger than any octave is capped
    if facts.get("square"):
        sizes["Tk"] = sizes["Tq"]
    elif key.op == "attention_decode":
        sizes["Tk"] = max(sizes["Tk"], sizes["Tq"])  # a cache holds the new tokens too
    elif sizes.get("Tq", 0) == sizes.get("Tk", 1):
        # Fewer queries than keys, as behind a prefix.
        least, _ = ends(bucket(sizes["Tk"]))
        axis, step = ("Tq", -1) if sizes["Tq"] > least else ("Tk", 1)
        sizes[axis] += step
    return sizes


def _distinct(key: Key) -> list[float]:
    return [0.0, 1.0] if sizes_at(key, 0.0) != sizes_at(key, 1.0) else [1.0]


def _joined(ranges: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Neighbours with one winner are one range."""
    last: tuple[float, str] | None = None
    for end, way in ranges:
        if last is not None and last[1] != way:
            yield last
        last = end, way
    if last is not None:
        yield last


def _of_both(way: str, others: Sequence[str], pair: str) -> str:
    """How a way of one pass is tried: in both, where the other pass has one of this name; else with
    its implementation's own choice for the other."""
    if not others or way in others:
        return way
    return pair.format(way, plans.implementation(way))


def _best(
    trials: Sequence[Trial], names: Sequence[str], part: int, seconds: Callable[[Trial], float]
) -> str | None:
    """The fastest of the ways with these names in one part of a trial's pair."""
    own = {trial.way.split("+")[part]: trial for trial in sorted(trials, key=seconds)[::-1]}
    found = [name for name in names if name in own]
    return min(found, key=lambda name: seconds(own[name]), default=None)


def _parts_of(way: str) -> set[str]:
    """A way, and those of its directions."""
    return {way, *way.split("+")}


def _check_alive(device: torch.device) -> None:
    """Ends the process, with a reason, where an error stays with the GPU: each further call would
    raise it too, also a right one."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise SystemExit(in_a_line(error)) from None
