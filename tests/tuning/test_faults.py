"""An implementation that is wrong, crashes, hangs or is slow is refused by name, and never chosen;
all else is measured as if it were not there."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import layer_norm
from gptkernels.core import cpu, plans
from gptkernels.core.tuned import FORWARD, PYTORCH, TRAINING, Key
from gptkernels.tuning import Classes, Report, supervisor, tune
from gptkernels.tuning.supervisor import Outcome
from gptkernels.tuning.trial import is_pytorchs

SETS = cpu.instruction_sets() if cpu.unavailable("cpu") is None else ()
pytestmark = pytest.mark.skipif(not SETS, reason="the CPU kernels are not built")

WORKER = (sys.executable, str(Path(__file__).parent / "faulty_worker.py"))
WIDTH, OTHER = 32, 48  # rows of the first have the fault
# With it there is no lower one to be tried, and the kernels are what runs before anything is known.
ISA = "v3" if "v3" in SETS else SETS and SETS[0]


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A child measures "torch", "pytorch" and "cpu", no lower instruction sets, on one thread."""
    monkeypatch.setenv("GPTKERNELS_TUNE", "cached")
    monkeypatch.setenv("GPTKERNELS_TUNED_FILE", str(tmp_path / "table.jsonl"))
    monkeypatch.setenv("GPTKERNELS_CPU_ISA", str(ISA))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plans.use("cpu", None)
    yield
    torch.set_num_threads(before)
    plans.use("cpu", None)


def keys(direction: str, rows: int, *widths: int) -> Classes:
    """The classes of layer_norm in one direction."""

    def call(C: int) -> Any:
        x, weight, bias = torch.randn(rows, C), torch.ones(C), torch.zeros(C)
        if direction == TRAINING:
            for tensor in (x, weight, bias):
                tensor.requires_grad_()
        return layer_norm(x, weight, bias)

    with plans.recording() as calls:
        for C in widths:
            call(C)
    return Classes(call.key for call in calls)


def width(key: Key) -> int:
    found: int = dict(key.facts)["C"]
    return found


def tuned(
    monkeypatch: pytest.MonkeyPatch, fault: str, classes: Classes, place: str = "cpu", **how: Any
) -> Report:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULT_IN", place)
    return tune(classes, seconds=120, worker=how.pop("worker", WORKER), **how)


def winners(report: Report, C: int) -> set[str]:
    return {way for e in report.entries if width(e.key) == C for _, way in e.ranges}


# fault -> the direction of the calls, their rows, and what the reason says.
FAULTS: dict[str, tuple[str, int, str]] = {
    "wrong": (FORWARD, 1, "it is wrong: error 1.0e+00"),
    "wrong weight": (TRAINING, 1, "it is wrong: error"),
    "wrong last row": (FORWARD, 1000, "it is wrong: error 1.0e+00"),
    "segfault": (FORWARD, 1, "it was ended by SIGSEGV"),
    "exit": (TRAINING, 1, "it ended with exit code 3 (a last word)"),
    "hang": (FORWARD, 1, "it was not done after 3 s"),
    "raise": (TRAINING, 1, "ValueError: no such thing"),
    "memory": (FORWARD, 1, "no memory is left: tried to allocate 1 PiB"),
    "other bits second": (FORWARD, 1, "it is not deterministic"),
    "other bits third": (TRAINING, 1, "it is not deterministic"),
    "unwritten": (FORWARD, 1000, "it is wrong: error inf"),
    "segfault late": (TRAINING, 1, "it was ended by SIGSEGV"),
    "hang late": (FORWARD, 1, "it was not done after 3 s"),
    "raise late": (FORWARD, 1, "ValueError: no such thing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direction, rows, why = FAULTS[fault]
    classes = keys(direction, rows, WIDTH, OTHER)
    report = tuned(monkeypatch, fault, classes, patience_s=3 if "hang" in fault else 30)
    assert not report.cannot
    assert not report.left
    assert {entry.key for entry in report.entries} == set(classes)
    assert {(width(key), way) for key, way, _ in report.refused} == {(WIDTH, "cpu")}
    ((_, _, said),) = report.refused
    assert said.startswith(why)
    assert "\n" not in said
    for entry in report.entries:
        measured = {way for point in entry.points for way in point["times"]}
        if width(entry.key) == WIDTH:
            assert entry.refused == {"cpu": said}
            assert all(is_pytorchs(way) for _, way in entry.ranges)
        else:
            assert not entry.refused
            assert {"torch", "cpu", PYTORCH} <= measured


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_a_slow_candidate_is_never_chosen(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT_DIRECTION", "forward")
    report = tuned(monkeypatch, "slow", keys(direction, 1, WIDTH))
    assert not report.refused
    assert winners(report, WIDTH) <= {"torch", PYTORCH}
    assert "cpu" in report.entries[0].points[0]["times"]


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_where_pytorch_is_slow_ours_is_chosen(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tuned(monkeypatch, "slow", keys(direction, 1, WIDTH), "torch")
    assert not report.refused
    assert winners(report, WIDTH) <= {"cpu", "cpu+torch"}


def test_a_class_in_which_pytorch_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    report = tuned(monkeypatch, "segfault", keys(FORWARD, 1, WIDTH, OTHER), "torch")
    assert [width(entry.key) for entry in report.entries] == [OTHER]
    ((key, why),) = report.cannot.items()
    assert width(key) == WIDTH
    assert why == "the process that measures was ended by SIGSEGV"


def test_what_is_printed_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    report = tuned(monkeypatch, "print", keys(FORWARD, 1, WIDTH, OTHER))
    assert len(report.entries) == 2
    assert not report.cannot
    assert not report.refused


GARBAGE = "import time\nwhile True: print('{}', flush=True), time.sleep(0.01)"
AT_START: dict[str, tuple[str, str]] = {
    "ends": ("raise SystemExit(7)", "the process that measures ended with exit code 7"),
    "cannot import": ("import nothing_of_this_name", "ended with exit code 1 (ModuleNotFoundError"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
    "hangs": ("import time; time.sleep(600)", "was not done after 1 s"),
    "prints for ever": (GARBAGE, "was not done after 1 s"),
}


@pytest.mark.parametrize("what", AT_START)
def test_a_worker_that_does_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class has a reason, soon."""
    code, why = AT_START[what]
    monkeypatch.setattr(supervisor, "_STARTING_S", 1.0)
    classes = keys(FORWARD, 1, WIDTH, OTHER)
    started = time.monotonic()
    worker = [sys.executable, "-c", code]
    report = tuned(monkeypatch, "", classes, worker=worker, patience_s=1)
    assert time.monotonic() - started < 20
    assert set(report.cannot) == set(classes)
    for said in report.cannot.values():
        assert why in said
    assert not report.entries
    assert not report.left
    assert report.path is None
    assert not report.trouble


def test_a_child_ends_with_whoever_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that hangs."""
    monkeypatch.setenv("FAULT", "hang")
    outcomes = [Outcome(key) for key in keys(FORWARD, 1, WIDTH)]
    with contextlib.closing(supervisor._Child(WORKER, outcomes, 60)) as child:
        while child.event(60).get("way") != "cpu":
            pass
        assert child._process.stdin is not None
        child._process.stdin.close()
        assert child._process.wait(20) == 1


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        tune(keys(FORWARD, 1, WIDTH), worker=["/no/such/program"])


def test_each_way_is_said_before_it_is_tried() -> None:
    """So that what ends or hangs the process has a name."""
    tried: list[tuple[Key, str]] = []
    classes = keys(FORWARD, 1, WIDTH)
    (found,) = supervisor.measure(classes, 60, trying=lambda key, way: tried.append((key, way)))
    assert found.entry is not None
    assert {key for key, _ in tried} == set(classes)
    assert sorted(way for _, way in tried) == ["cpu", PYTORCH, "torch"]


def one(weight: Tensor) -> Tensor:
    out = layer_norm(torch.ones(1, WIDTH), weight)
    assert isinstance(out, Tensor)
    return out


def test_the_next_call_runs_by_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class in which the kernel is wrong."""
    with plans.recording() as calls:
        one(torch.ones(WIDTH))
    tuned(monkeypatch, "wrong", Classes(call.key for call in calls))
    plan = plans.of(calls[0])
    assert plan.measured
    assert plan.whole == PYTORCH or (plan.forward, plan.backward) == ("torch", "torch")
