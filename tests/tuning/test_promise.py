"""The promise of impl="auto": what counts as kept, and which calls are put to the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import threads

from gptkernels import attention, layer_norm
from gptkernels.bench.timing import Timing
from gptkernels.core import cpu, plans
from gptkernels.core.tuned import COMPILED, EAGER, FORWARD, PYTORCH, Entry, Key, Table, bucket
from gptkernels.tuning import promise
from gptkernels.tuning.promise import Kept, holds, points
from gptkernels.tuning.trial import AUTO

pytestmark = pytest.mark.skipif(
    cpu.unavailable("cpu") is not None, reason="the CPU kernels are not built"
)

US = 1e-6
ENTRY = Entry(Key("layer_norm", FORWARD, COMPILED, (), (("rows", 3),)), ((1.0, "cpu"),))


def point(auto_s: float, best_s: float) -> Kept:
    return Kept(ENTRY, {"rows": 8}, "cpu", auto_s, "torch", best_s)


@pytest.mark.parametrize(
    ("auto_us", "best_us", "kept", "broken"),
    [
        (100.0, 100.0, True, False),
        (50.0, 100.0, True, False),
        (102.9, 100.0, True, False),
        (103.1, 100.0, False, False),
        (107.9, 100.0, False, False),
        (108.1, 100.0, False, True),
        (6.9, 5.0, True, False),  # 2 us are never too much
        (7.1, 5.0, False, True),
        (1.1, 1.0, True, False),
    ],
)
def test_what_is_kept(auto_us: float, best_us: float, kept: bool, broken: bool) -> None:
    found = point(auto_us * US, best_us * US)
    assert (found.is_kept, found.is_broken) == (kept, broken)
    assert found.excess == pytest.approx(auto_us / best_us - 1)


@pytest.mark.parametrize(
    ("kept", "behind", "broken", "promised"),
    [
        (20, 0, 0, True),
        (19, 1, 0, True),  # 95%
        (18, 2, 0, False),
        (94, 6, 0, False),
        (19, 0, 1, False),  # none may be far behind
        (0, 1, 0, False),
    ],
)
def test_when_it_holds(kept: int, behind: int, broken: int, promised: bool) -> None:
    found = [point(1.0, 1.0)] * kept + [point(1.05, 1.0)] * behind + [point(1.2, 1.0)] * broken
    assert holds(found) == promised


def test_a_point_in_words() -> None:
    assert str(point(12.34 * US, 10.0 * US)) == (
        "layer_norm forward rows 8: cpu 12.3 us, torch 10.0 us"
    )


def test_nothing_was_measured() -> None:
    for table in (Table(), Table([ENTRY])):  # in graphs alone
        with pytest.raises(ValueError, match="run gptkernels tune first"):
            next(points(table, 1, 0))


def test_classes_of_other_threads_are_left_out() -> None:
    """`use` alone does not say so: calls with so many threads are of other classes."""
    facts = {"device": "cpu", "threads": torch.get_num_threads() + 1}
    key = Key.of("layer_norm", FORWARD, EAGER, facts, {"rows": 4})
    with pytest.raises(ValueError, match="with so many threads"):
        next(points(Table([Entry(key, ((1.0, "torch"),))]), 1, 0))


# ---- points


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    plans.use("cpu", None)
    with threads(1):
        yield
    plans.use("cpu", None)


def classes(function: Callable[[], Any]) -> list[Key]:
    with plans.recording() as calls, torch.no_grad():
        function()
    return [call.key for call in calls]


def table(*ranges: tuple[float, str], rows: int = 40, **how: Any) -> Table:
    """Of one class, installed: both ends were measured, and "cpu" was faster there."""
    (key,) = classes(lambda: layer_norm(torch.randn(rows, 32), torch.ones(32)))
    times = {way: [1.0, 1.0, 1.0] for way in ("torch", PYTORCH, "cpu", "cpu:v9")}
    measured = ({"position": 1.0, "sizes": {"rows": 64}, "times": times, "holds": ["cpu"]},)
    found = Table([Entry(key, ranges or ((1.0, "cpu"),), measured, **how)])
    plans.use("cpu", found)
    return found


class Clock:
    """In place of `timing.compare`: the seconds of each name, one dict for each time it is asked;
    the last for all further ones."""

    def __init__(self, *answers: dict[str, float]) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    def __call__(self, calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        self.asked.append(list(calls))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return {name: Timing.of([answer.get(name, 1.0)]) for name in calls}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def install(*answers: dict[str, float]) -> Clock:
        made = Clock(*answers)
        monkeypatch.setattr(promise.timing, "compare", made)
        return made

    return install


def test_what_auto_stands_beside(clock: Callable[..., Clock]) -> None:
    """PyTorch's, what beat it somewhere, and plain PyTorch; not what never did."""
    asked = clock({})
    (found,) = points(table(), 1, 0)
    assert asked.asked == [[AUTO, "cpu", PYTORCH, "torch", promise.PLAIN]]
    assert found.way == "cpu"
    assert found.is_kept


def test_what_is_refused_is_no_yardstick(clock: Callable[..., Clock]) -> None:
    asked = clock({})
    list(points(table((1.0, "torch"), refused={"cpu": "it is wrong"}), 1, 0))
    assert "cpu" not in asked.asked[0]


def test_a_point_that_is_not_kept_is_timed_again(clock: Callable[..., Clock]) -> None:
    asked = clock({AUTO: 1.2}, {AUTO: 1.1}, {AUTO: 1.01})
    (found,) = points(table(), 1, 0)
    assert found.is_kept
    assert found.auto_s == 1.01
    assert asked.asked[1:] == [[AUTO, found.best]] * 2


def test_a_point_that_is_behind_three_times_is(clock: Callable[..., Clock]) -> None:
    asked = clock({AUTO: 1.2, PYTORCH: 0.9})
    (found,) = points(table(), 1, 0)
    assert found.is_broken
    assert found.best == PYTORCH
    assert asked.asked[1:] == [[AUTO, PYTORCH]] * 2


def test_points_lie_in_the_octave(clock: Callable[..., Clock]) -> None:
    clock({})
    found = list(points(table((0.5, "torch"), (1.0, "cpu")), 25, 7))
    rows = [point.sizes["rows"] for point in found]
    assert all(bucket(n) == 6 for n in rows)
    assert len(set(rows)) > 8
    assert {point.way for point in found} == {"torch", "cpu"}
    for point in found:  # 45.6 rows are half the way
        assert point.way == ("torch" if point.sizes["rows"] <= 45 else "cpu")
    again = points(table(), 25, 7)
    assert [point.sizes["rows"] for point in again] == rows
    assert [point.sizes["rows"] for point in points(table(), 25, 8)] != rows


def test_points_of_attention_are_of_its_class(clock: Callable[..., Clock]) -> None:
    """Runner refuses a call of another class."""
    clock({})
    q, k = torch.randn(3, 12, 6, 16), torch.randn(3, 14, 2, 16)
    (key,) = classes(lambda: attention(q, k, k.clone()))
    entries = [Entry(key, ((1.0, "torch"),))]
    for point in points(Table(entries), 10, 3):
        assert point.sizes["heads"] % 3 == 0
        assert point.sizes["Tq"] != point.sizes["Tk"]


@pytest.mark.parametrize("way", ["cpu", "torch", PYTORCH])
def test_auto_runs_what_the_table_says(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was timed just before it."""
    from gptkernels.ops.layer_norm import cpu as kernels
    from gptkernels.ops.layer_norm import torch as plain
    from gptkernels.ops.layer_norm import whole

    ran: list[str] = []

    def watch(name: str, module: Any, function: str) -> None:
        own = getattr(module, function)

        def spy(*given: Any) -> Any:
            ran.append(name)
            return own(*given)

        monkeypatch.setattr(module, function, spy)

    watch("cpu", kernels, "without_statistics")
    watch("cpu", kernels, "layer_norm_fwd")
    watch("torch", plain, "layer_norm_fwd")
    watch(PYTORCH, whole, "pytorch")
    seen = []

    def compare(calls: dict[str, Any], **how: Any) -> dict[str, Timing]:
        for _ in range(3):
            for name, call in calls.items():
                ran.clear()
                call()
                seen.append((name, *ran))
        return {name: Timing.of([1.0]) for name in calls}

    monkeypatch.setattr(promise.timing, "compare", compare)
    list(points(table((1.0, way)), 1, 0))
    wanted = {(AUTO, way), ("cpu", "cpu"), ("torch", "torch"), (PYTORCH, PYTORCH), (promise.PLAIN,)}
    assert set(seen) == wanted


def test_real_points() -> None:
    (key,) = classes(lambda: layer_norm(torch.randn(6, 16), torch.ones(16)))
    entry = Entry(key, ((1.0, "torch"),))
    found = list(points(Table([entry]), 3, 1))
    assert len(found) == 3
    for point in found:
        assert point.auto_s > 0
        assert point.best_s > 0
        assert point.best == promise.PLAIN
    assert isinstance(holds(found), bool)
