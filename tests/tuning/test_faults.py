"""An implementation that is wrong, crashes, hangs or is slow is refused by name, and never chosen;
all else is measured as if it were not there."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from gptkernels import layer_norm
from gptkernels.core import cpu, plans
from gptkernels.core.tuned import FORWARD, PYTORCH, TRAINING, Entry, Key
from gptkernels.tuning import Classes, Report, supervisor, tune
from gptkernels.tuning.supervisor import Outcome
from gptkernels.tuning.trial import is_pytorchs

SETS = cpu.instruction_sets() if cpu.unavailable("cpu") is None else ()
pytestmark = pytest.mark.skipif(not SETS, reason="the CPU kernels are not built")

WORKER = (sys.executable, str(Path(__file__).parent / "faulty_worker.py"))
# With it there is no lower one to be tried, and the kernels are what runs before anything is known.
ISA = "v3" if "v3" in SETS else SETS and SETS[0]


class Case(NamedTuple):
    """Calls of layer_norm whose width alone has the fault."""

    fault: str
    direction: str = FORWARD
    rows: int = 1


# What the reason begins with for which impl="cpu" is refused.
REFUSED = {
    Case("segfault"): "it was ended by SIGSEGV",
    Case("segfault late", TRAINING): "it was ended by SIGSEGV",
    Case("exit", TRAINING): "it ended with exit code 3 (a last word)",
    Case("hang"): "it was not done after 120 s",
    Case("hang late"): "it was not done after 120 s",
    Case("raise", TRAINING): "ValueError: no such thing",
    Case("raise late"): "ValueError: no such thing",
    Case("memory"): "no memory is left: tried to allocate 1 PiB",
    Case("wrong"): "it is wrong: error 1.0e+00",
    Case("wrong weight", TRAINING): "it is wrong: error",
    Case("wrong last row", rows=1000): "it is wrong: error 1.0e+00",
    Case("unwritten", rows=1000): "it is wrong: error inf",
    Case("other bits second"): "it is not deterministic",
    Case("other bits third", TRAINING): "it is not deterministic",
}
CRASH_OF_PYTORCH = Case("segfault in PyTorch")
SLOW = [Case("slow"), Case("slow", TRAINING)]
SLOW_PYTORCH = [Case("slow in PyTorch"), Case("slow in PyTorch", TRAINING)]
PRINTS = Case("print")
NO_FAULT = [Case("none"), Case("none", TRAINING), Case("none", rows=1000)]
CASES = [*REFUSED, CRASH_OF_PYTORCH, *SLOW, *SLOW_PYTORCH, PRINTS, *NO_FAULT]
# The widest is measured first, and those without a fault behind all others of as many rows.
WIDTHS = {case: 8 * (len(CASES) - i) for i, case in enumerate(CASES)}


def each(cases: Sequence[Case]) -> Any:
    """The test with each of these cases."""
    names = [f"{case.fault}-{case.direction}-{case.rows}" for case in cases]
    return pytest.mark.parametrize("case", cases, ids=names)


def call_of(case: Case) -> plans.Call:
    """As it is looked up."""
    C = WIDTHS[case]
    x, weight, bias = torch.randn(case.rows, C), torch.ones(C), torch.zeros(C)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(case.direction == TRAINING)
    with plans.recording() as calls:
        layer_norm(x, weight, bias)
    return calls[0]


def classes(cases: Sequence[Case]) -> Classes:
    return Classes(call_of(case).key for case in cases)


@pytest.fixture(scope="module", autouse=True)
def _own_table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A child measures "torch", "pytorch" and "cpu", no lower instruction sets, on one thread."""
    before = torch.get_num_threads()
    faults = {width: case.fault for case, width in WIDTHS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", json.dumps(faults))
        patch.setenv("GPTKERNELS_TUNE", "cached")
        patch.setenv("GPTKERNELS_TUNED_FILE", str(tmp_path_factory.mktemp("table") / "table.jsonl"))
        patch.setenv("GPTKERNELS_CPU_ISA", str(ISA))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        plans.use("cpu", None)
        yield
    torch.set_num_threads(before)
    plans.use("cpu", None)


class Clock:
    """The supervisor's, by which an hour is over where a child says that it hangs: what is right
    may take long on a busy machine, and yet nobody waits for what hangs."""

    _hours = 0
    _event = staticmethod(supervisor._event)

    def monotonic(self) -> float:
        return time.monotonic() + 3600 * self._hours

    def event(self, line: str, classes: int) -> Any:
        self._hours += line == "hangs\n"
        return self._event(line, classes)


@dataclass
class Found:
    """What one `tune` of all cases found, and the ways that it said it would try."""

    report: Report
    tried: list[tuple[Key, str]]

    def entry(self, case: Case) -> Entry:
        (found,) = (e for e in self.report.entries if e.key == call_of(case).key)
        return found


@pytest.fixture(scope="module")
def found() -> Found:
    """All in one, because every child has to import PyTorch."""
    tried: list[tuple[Key, str]] = []
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "time", clock)
        patch.setattr(supervisor, "_event", clock.event)
        report = tune(
            classes(CASES),
            seconds=24 * 3600,
            worker=WORKER,
            patience_s=120,
            trying=lambda key, way: tried.append((key, way)),
        )
    return Found(report, tried)


@each(list(REFUSED))
def test_a_fault_is_refused_by_name(case: Case, found: Found) -> None:
    entry = found.entry(case)
    ((way, why),) = entry.refused.items()
    assert way == "cpu"
    assert why.startswith(REFUSED[case])
    assert "\n" not in why
    assert all(is_pytorchs(way) for _, way in entry.ranges)


@each([*SLOW, *SLOW_PYTORCH, PRINTS, *NO_FAULT])
def test_all_else_is_measured_in_full(case: Case, found: Found) -> None:
    entry = found.entry(case)
    assert not entry.refused
    for point in entry.points:
        assert {"torch", "cpu", PYTORCH} <= set(point["times"])


def test_each_class_is_answered_once(found: Found) -> None:
    answered = [*(entry.key for entry in found.report.entries), *found.report.cannot]
    assert len(answered) == len(CASES)
    assert set(answered) == set(classes(CASES))
    assert not found.report.left


def test_a_class_in_which_pytorch_crashes(found: Found) -> None:
    assert found.report.cannot == {
        call_of(CRASH_OF_PYTORCH).key: "the process that measures was ended by SIGSEGV"
    }


@each(SLOW)
def test_a_slow_candidate_is_never_chosen(case: Case, found: Found) -> None:
    assert {way for _, way in found.entry(case).ranges} <= {"torch", PYTORCH}


@each(SLOW_PYTORCH)
def test_where_pytorch_is_slow_ours_is_chosen(case: Case, found: Found) -> None:
    assert {way for _, way in found.entry(case).ranges} <= {"cpu", "cpu+torch"}


def test_each_way_is_said_before_it_is_tried(found: Found) -> None:
    """So that what ends or hangs the process has a name."""
    key = call_of(NO_FAULT[0]).key
    assert sorted(way for of, way in found.tried if of == key) == ["cpu", PYTORCH, "torch"]


def test_the_next_call_runs_by_what_was_found(found: Found) -> None:
    """Of a class in which the kernel is wrong."""
    plan = plans.of(call_of(Case("wrong")))
    assert plan.measured
    assert plan.whole == PYTORCH or (plan.forward, plan.backward) == ("torch", "torch")


GARBAGE = "import time\nfor _ in range(12_000): print('{}', flush=True), time.sleep(0.01)"
# name -> what it does, how long it may take, and why its classes have no entry.
AT_START: dict[str, tuple[str, float, str]] = {
    "ends": ("raise SystemExit(7)", 60, "the process that measures ended with exit code 7"),
    "cannot import": (
        "import nothing_of_this_name", 60, "ended with exit code 1 (ModuleNotFoundError"
    ),
    "is killed": ("import os; os.kill(os.getpid(), 9)", 60, "was ended by SIGKILL"),
    "hangs": ("import time; time.sleep(600)", 1, "was not done after 1 s"),
    "prints on and on": (GARBAGE, 1, "was not done after 1 s"),
}  # fmt: skip


@pytest.mark.parametrize("what", AT_START)
def test_a_worker_that_does_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class has a reason, after one child of its own."""
    code, patience_s, why = AT_START[what]
    monkeypatch.setattr(supervisor, "_STARTING_S", 0.0)
    keys = classes(NO_FAULT[:2])
    with mock.patch.object(supervisor, "_Child", wraps=supervisor._Child) as started:
        report = tune(keys, worker=[sys.executable, "-c", code], patience_s=patience_s)
    assert started.call_count == 2
    assert set(report.cannot) == set(keys)
    for said in report.cannot.values():
        assert why in said
    assert not report.entries
    assert not report.left
    assert report.path is None
    assert not report.trouble


def test_a_child_ends_with_whoever_waits_for_it() -> None:
    """Also one that hangs."""
    outcomes = [Outcome(key) for key in classes([Case("hang")])]
    with contextlib.closing(supervisor._Child(WORKER, outcomes, 60)) as child:
        while child._lines.get(timeout=120) != "hangs\n":
            pass
        assert child._process.stdin is not None
        child._process.stdin.close()
        assert child._process.wait(60) == 1


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        tune(classes(NO_FAULT[:1]), worker=["/no/such/program"])
