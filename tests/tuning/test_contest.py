"""Which way wins a class, with fakes in place of all that runs or takes time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptkernels.bench.timing import Timing
from gptkernels.core.tuned import EAGER, FORWARD, PYTORCH, TRAINING, Entry, Key, bucket
from gptkernels.tuning import contest
from gptkernels.tuning.contest import Contest, sizes_at, whole_groups
from gptkernels.tuning.trial import Refused, Trial, is_pytorchs
from gptkernels.tuning.ways import Ways

ROWS = (("rows", 4),)  # 9 ... 16


def key(direction: str = FORWARD, op: str = "layer_norm", buckets: Any = ROWS, **facts: Any) -> Key:
    return Key(op, direction, EAGER, tuple(sorted(facts.items())), buckets)


# way -> seconds of its forward and its backward pass, by rows; or what it raises.
Seconds = Callable[[int], tuple[float, float]]


def steady(forward: float, backward: float = 0.0) -> Seconds:
    return lambda rows: (forward, backward)


@dataclass
class World:
    """What the fakes answer."""

    ways: dict[str, Seconds]
    whole: list[str] = field(default_factory=lambda: [PYTORCH])
    backward_only: list[str] = field(default_factory=list)
    # (way, rows) -> its seconds in the second timing, where they are others.
    fresh: dict[str, Seconds] = field(default_factory=dict)
    raising: dict[str, Callable[[int], Exception | None]] = field(default_factory=dict)
    rows: int = 0
    training: bool = False
    compared: list[list[str]] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    clock: float = 0.0

    def seconds(self, way: str, fresh: bool = False) -> tuple[float, float]:
        forward, backward = self._seconds(way, fresh)
        return forward, backward if self.training else 0.0

    def _seconds(self, way: str, fresh: bool) -> tuple[float, float]:
        if fresh and way in self.fresh:
            return self.fresh[way](self.rows)
        if way in self.ways:
            return self.ways[way](self.rows)
        forward, _, backward = way.partition("+")
        return self.ways[forward](self.rows)[0], self.ways[backward](self.rows)[1]

    def entry(self, of: Key, refused: Any = None, seconds: float = 1e9) -> Entry:
        return Contest(of, refused or {}, self.tried.append, seconds).entry()


class FakeRunner:
    device = torch.device("cpu")

    def __init__(self, world: World) -> None:
        self.world = world

    def trial(self, way: str) -> Trial:
        error = self.world.raising.get(way, lambda rows: None)(self.world.rows)
        if error is not None:
            raise error
        return Trial(way, *self.world.seconds(way), 1.0, 2.0, lambda: way)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World({"torch": steady(10.0, 10.0), PYTORCH: steady(10.0, 10.0)})
    monkeypatch.setattr(contest, "_HALVINGS", 2)

    def problem(of: Key, sizes: Any) -> Any:
        made.rows, made.training = sizes["rows"], of.direction == TRAINING
        return SimpleNamespace(device=torch.device("cpu"), inputs={})

    def ways_of(of: Key, inputs: Any) -> Ways:
        ours = [way for way in made.ways if way not in made.whole and "+" not in way]
        forward = [way for way in ours if way not in made.backward_only]
        return Ways(made.whole, forward, ours if of.direction == TRAINING else [])

    def compare(calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        fresh = len(made.compared) % 2 == 1
        made.compared.append(list(calls))
        made.clock += 1
        found = {}
        for way in calls:
            seconds = sum(made.seconds(way, fresh))
            found[way] = Timing(seconds, seconds, seconds, seconds, 7, None, (seconds,) * 7)
        # The second timing is there only where ours are faster.
        others = [way for way in calls if is_pytorchs(way)]
        best = min(found[way].time_s for way in others)
        if not fresh and not any(found[way].time_s < best for way in calls):
            made.compared.append([])
        return found

    monkeypatch.setattr(contest, "problem", problem)
    monkeypatch.setattr(contest, "Runner", lambda of, made_problem: FakeRunner(made))
    monkeypatch.setattr(contest.ways, "of", ways_of)
    monkeypatch.setattr(contest.timing, "compare", compare)
    monkeypatch.setattr(contest.time, "monotonic", lambda: made.clock)
    return made


@pytest.mark.parametrize(
    ("disturbed", "asked", "holds"), [(0, 2, True), (1, 3, True), (2, 3, False)]
)
def test_a_fresh_run_that_was_disturbed_is_repeated_once(
    disturbed: int, asked: int, holds: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as long in six of nine samples, and six times as long in three."""
    runs: list[list[str]] = []

    def compare(calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        runs.append(list(calls))
        own = [5.0] * 6 + [60.0 if 1 < len(runs) <= 1 + disturbed else 5.0] * 3
        return {way: Timing.of(own if way == "cpu" else [10.0] * 9) for way in calls}

    monkeypatch.setattr(contest.timing, "compare", compare)
    world.ways["cpu"] = steady(5.0)
    entry = world.entry(key(buckets=(("rows", 0),)))
    assert len(runs) == asked
    assert entry.ranges == ((1.0, "cpu" if holds else "torch"),)


def faster_up_to(rows: int, fast: float = 5.0, slow: float = 20.0) -> Seconds:
    return lambda here: (fast if here <= rows else slow, 0.0)


def positions(entry: Entry) -> list[float]:
    return [point["position"] for point in entry.points]


def test_what_is_faster_at_both_ends_wins(world: World) -> None:
    world.ways["cpu"] = steady(9.0)
    entry = world.entry(key())
    assert entry.ranges == ((1.0, "cpu"),)
    assert positions(entry) == [0.0, 1.0]
    assert [point["sizes"] for point in entry.points] == [{"rows": 9}, {"rows": 16}]
    assert all(point["holds"] == ["cpu"] for point in entry.points)
    assert entry.errors == dict.fromkeys(("torch", "cpu", PYTORCH), (1.0, 2.0))


@pytest.mark.parametrize(("fast_up_to", "end"), [(9, 0.25), (10, 0.25), (12, 0.5), (14, 0.75)])
def test_a_class_is_halved_where_winners_change(world: World, fast_up_to: int, end: float) -> None:
    """9, 10, 12, 14 and 16 rows are its quarters."""
    world.ways["cpu"] = faster_up_to(fast_up_to)
    entry = world.entry(key())
    if fast_up_to == 9:  # it wins at the end alone, and of no part at both ends
        assert entry.ranges == ((1.0, "torch"),)
        assert positions(entry) == [0.0, 0.25, 0.5, 1.0]
    else:
        assert entry.ranges == ((end, "cpu"), (1.0, "torch"))
    if fast_up_to == 14:
        assert positions(entry) == [0.0, 0.5, 0.75, 1.0]
    for point in entry.points:
        assert point["holds"] == (["cpu"] if point["sizes"]["rows"] <= fast_up_to else [])


def test_a_winner_of_the_upper_part(world: World) -> None:
    world.ways["cpu"] = lambda rows: (5.0 if rows >= 12 else 20.0, 0.0)
    assert world.entry(key()).ranges == ((0.5, "torch"), (1.0, "cpu"))


def test_two_of_ours_share_a_class(world: World) -> None:
    world.ways |= {"cpu": faster_up_to(12, 5.0, 6.5), "cpu:v3": faster_up_to(12, 6.5, 5.0)}
    entry = world.entry(key())
    # Between 12 and 14 rows both hold at both ends, and one is as far off as the other.
    assert entry.ranges == ((0.75, "cpu"), (1.0, "cpu:v3"))


@pytest.mark.parametrize("seconds", [10.0, 10.01, 9.99])
def test_a_tie_stays_with_pytorch(world: World, seconds: float) -> None:
    world.ways["cpu"] = steady(seconds)
    assert world.entry(key()).ranges == ((1.0, "torch"),)


@pytest.mark.parametrize(
    ("torch_s", "pytorch_s", "winner"),
    [(10.0, 10.0, "torch"), (10.04, 10.0, "torch"), (10.2, 10.0, PYTORCH), (10.0, 10.2, "torch")],
)
def test_our_op_rather_than_pytorchs_within_the_noise(
    world: World, torch_s: float, pytorch_s: float, winner: str
) -> None:
    world.ways |= {"torch": steady(torch_s), PYTORCH: steady(pytorch_s)}
    assert world.entry(key()).ranges == ((1.0, winner),)


@pytest.mark.parametrize(("again", "winner"), [(5.0, "cpu"), (10.0, "torch"), (12.0, "torch")])
def test_a_fresh_run_decides(world: World, again: float, winner: str) -> None:
    world.ways["cpu"] = steady(5.0)
    world.fresh["cpu"] = steady(again)
    assert world.entry(key()).ranges == ((1.0, winner),)


def test_the_bound_of_the_fresh_run_decides(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its median is faster, but not by more than the noise."""
    world.ways["cpu"] = steady(9.0)
    own = contest.timing.compare

    def noisy(calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        found = own(calls, **how)
        samples = (8.0, 8.0, 8.0, 8.0, 12.0, 12.0, 12.0)
        if "cpu" in found:
            found["cpu"] = Timing(8.0, 8.0, 12.0, 8.0, 7, None, samples)
        return found

    monkeypatch.setattr(contest.timing, "compare", noisy)
    entry = world.entry(key())
    assert entry.ranges == ((1.0, "torch"),)
    assert not any(point["holds"] for point in entry.points)


def test_the_best_of_each_direction_are_a_pair(world: World) -> None:
    world.ways |= {"cpu": steady(2.0, 9.0), "cpu:v3": steady(9.0, 2.0)}
    entry = world.entry(key(TRAINING))
    assert entry.ranges == ((1.0, "cpu+cpu:v3"),)
    assert "cpu+cpu:v3" in world.compared[0]


def test_a_pair_with_pytorchs(world: World) -> None:
    world.ways["cpu"] = steady(2.0, 11.0)
    assert world.entry(key(TRAINING)).ranges == ((1.0, "cpu+torch"),)


def test_a_pair_that_is_wrong_is_not_chosen(world: World) -> None:
    world.ways |= {"cpu": steady(2.0, 9.0), "cpu:v3": steady(9.0, 2.0)}
    world.raising["cpu+cpu:v3"] = lambda rows: Refused("it is wrong")
    entry = world.entry(key(TRAINING))
    assert entry.refused == {"cpu+cpu:v3": "it is wrong"}
    assert entry.ranges in (((1.0, "cpu"),), ((1.0, "cpu:v3"),))


def test_there_is_no_pair_without_gradients(world: World) -> None:
    world.ways |= {"cpu": steady(2.0, 9.0), "cpu:v3": steady(9.0, 2.0)}
    world.entry(key())
    assert not any("+" in way for way in world.tried)


def test_a_way_of_the_backward_pass_alone(world: World) -> None:
    world.ways |= {"triton": steady(3.0, 9.0), "triton:tile=4": steady(0.0, 3.0)}
    world.backward_only.append("triton:tile=4")
    entry = world.entry(key(TRAINING))
    assert entry.ranges == ((1.0, "triton+triton:tile=4"),)
    assert "triton:tile=4" not in world.tried


def test_one_size_is_one_point(world: World) -> None:
    world.ways["cpu"] = steady(5.0)
    for k in (0, 1):
        entry = world.entry(key(buckets=(("rows", k),)))
        assert entry.ranges == ((1.0, "cpu"),)
        assert positions(entry) == [1.0]


def test_no_time_no_halves(world: World) -> None:
    world.ways["cpu"] = faster_up_to(12)
    entry = world.entry(key(), seconds=2.5)  # of a clock that counts timings
    assert entry.ranges == ((1.0, "torch"),)
    assert positions(entry) == [0.0, 1.0]


def test_what_is_refused_anywhere_is_nowhere_chosen(world: World) -> None:
    """At its upper end, found out in the second half; or in the middle alone."""
    world.ways["cpu"] = faster_up_to(12)
    world.raising["cpu"] = lambda rows: Refused("it is wrong") if rows == 14 else None
    entry = world.entry(key())
    assert entry.refused == {"cpu": "it is wrong"}
    assert entry.ranges == ((1.0, "torch"),)


def test_a_pair_of_what_is_refused_later(world: World) -> None:
    world.ways |= {"cpu": steady(2.0, 9.0), "cpu:v3": steady(9.0, 2.0)}
    world.raising["cpu:v3"] = lambda rows: Refused("it is wrong") if rows == 16 else None
    entry = world.entry(key(TRAINING))
    assert "cpu+cpu:v3" in entry.points[0]["times"]
    # Beside the pair, the other was too slow at the lower end to be timed.
    assert entry.ranges == ((0.25, "torch"), (1.0, "cpu"))


def test_a_pair_that_has_won_before(world: World) -> None:
    """In the lower half; the upper one shows that a part of it is wrong."""
    world.ways["cpu"] = lambda rows: (2.0, 9.0) if rows <= 12 else (20.0, 20.0)
    world.ways["cpu:v3"] = lambda rows: (9.0, 2.0) if rows <= 12 else (20.0, 20.0)
    assert world.entry(key(TRAINING)).ranges == ((0.5, "cpu+cpu:v3"), (1.0, "torch"))
    world.raising["cpu:v3"] = lambda rows: Refused("it is wrong") if rows == 14 else None
    assert world.entry(key(TRAINING)).ranges == ((1.0, "torch"),)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("1 PiB\nof it"), "no memory is left: 1 PiB"),
        (Refused("it is wrong"), "it is wrong"),
        (RuntimeError("\nsome line\nanother"), "RuntimeError: some line"),
        (ValueError(), "ValueError"),
    ],
)
def test_reasons(world: World, error: Exception, why: str) -> None:
    world.ways["cpu"] = steady(1.0)
    world.raising["cpu"] = lambda rows: error
    entry = world.entry(key())
    assert entry.refused == {"cpu": why}
    assert entry.ranges == ((1.0, "torch"),)
    assert world.tried.count("cpu") == 1


def test_what_is_refused_before_is_not_tried(world: World) -> None:
    world.ways["cpu"] = steady(1.0)
    entry = world.entry(key(), {"cpu": "it crashed"})
    assert entry.refused == {"cpu": "it crashed"}
    assert entry.ranges == ((1.0, "torch"),)
    assert "cpu" not in world.tried


def test_what_raises_while_it_is_timed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ways["cpu"] = steady(1.0)
    own = contest.timing.compare

    def raising(calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return own(calls, **how)

    def trial(self: FakeRunner, way: str) -> Trial:
        def call() -> None:
            if way == "cpu":
                raise RuntimeError("only now")

        return Trial(way, *self.world.seconds(way), 1.0, 2.0, call)

    monkeypatch.setattr(contest.timing, "compare", raising)
    monkeypatch.setattr(FakeRunner, "trial", trial)
    entry = world.entry(key())
    assert entry.refused == {"cpu": "RuntimeError: only now, after some runs"}
    assert entry.ranges == ((1.0, "torch"),)
    assert all("cpu" not in point["times"] for point in entry.points)


def test_a_class_that_pytorch_cannot_run(world: World) -> None:
    world.ways["cpu"] = steady(1.0)
    for way in ("torch", PYTORCH):
        world.raising[way] = lambda rows: torch.OutOfMemoryError("1 PiB")
    with pytest.raises(NotImplementedError, match="PyTorch itself cannot run it") as raised:
        world.entry(key())
    assert "torch: no memory is left: 1 PiB" in str(raised.value)


def test_pytorchs_that_run_at_one_end_each(world: World) -> None:
    world.ways["cpu"] = steady(1.0)
    world.raising["torch"] = lambda rows: Refused("no") if rows == 9 else None
    world.raising[PYTORCH] = lambda rows: Refused("no") if rows == 16 else None
    with pytest.raises(NotImplementedError, match="PyTorch itself cannot run it"):
        world.entry(key())


def test_an_error_of_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its limit, where the truth is zero."""

    def trial(self: FakeRunner, way: str) -> Trial:
        return Trial(way, 1.0, 1.0, 0.0, 0.0, lambda: None)

    monkeypatch.setattr(FakeRunner, "trial", trial)
    assert world.entry(key()).errors == dict.fromkeys(("torch", PYTORCH), (0.0, 0.0))


def test_what_is_far_behind_is_timed_once_more_at_most(world: World) -> None:
    """Its time in the trial is kept, for people."""
    world.ways |= {"cpu": steady(5.0), "cpu:v3": steady(50.0)}
    entry = world.entry(key())
    assert all("cpu:v3" not in ways for ways in world.compared)
    assert all(point["times"]["cpu:v3"] == [50.0] * 3 for point in entry.points)
    # To be compared with.
    assert any({"torch", PYTORCH} & set(ways) for ways in world.compared)


# ---- sizes


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("k", [3, 4, 5, 6, 9])
def test_heads_in_whole_groups(group: int, k: int) -> None:
    if group > 2**k:
        pytest.skip("no call has fewer heads than a group")
    of = key(op="attention", buckets=(("heads", k),), group=group)
    for position in (0.0, 0.25, 0.5, 0.75, 1.0):
        heads = sizes_at(of, position)["heads"]
        assert heads % group == 0
        assert bucket(heads) == k


def test_a_group_that_is_larger_than_the_cap() -> None:
    assert sizes_at(key(op="attention", buckets=(("heads", 4),), group=40), 1.0) == {"heads": 40}


SQUARE = (("Tk", 5), ("Tq", 5), ("heads", 2))


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_square_calls_stay_square_and_others_do_not_become_so(op: str) -> None:
    for position in (0.0, 0.3, 1.0):
        for square in (True, False):
            of = key(op=op, buckets=SQUARE, group=1, square=square)
            sizes = sizes_at(of, position)
            assert (sizes["Tq"] == sizes["Tk"]) == square
            assert bucket(sizes["Tq"]) == bucket(sizes["Tk"]) == 5
    # Also at random sizes, which the promise draws.
    of = key(op=op, buckets=SQUARE, group=1, square=True)
    assert whole_groups(of, {"Tq": 20, "Tk": 30, "heads": 3}) == {"Tq": 20, "Tk": 20, "heads": 3}


def test_a_cache_may_be_as_long_as_the_queries() -> None:
    of = key(op="attention_decode", buckets=SQUARE, group=1, square=False)
    assert sizes_at(of, 1.0) == {"Tq": 32, "Tk": 32, "heads": 4}
