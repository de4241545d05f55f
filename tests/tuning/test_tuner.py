"""gptkernels.tune: what it measures of a model, what it leaves as it was, and what it keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, threads
from torch import Tensor, nn

from gptkernels import layer_norm
from gptkernels.core import plans, tuned_files
from gptkernels.core.tuned import COMPILED, EAGER, FORWARD, TRAINING, Entry, Key, Table
from gptkernels.tuning import Classes, Report, record, supervisor, tune

WIDTHS = (16, 24, 32)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("GPTKERNELS_TUNE", "cached")
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTKERNELS_TUNED_FILE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tuned_files, "_SHIPPED", tmp_path / "shipped")
    plans.use("cpu", None)
    with threads(1):
        yield
    plans.use("cpu", None)


class Norms(nn.Module):
    """One class of calls for each width, with dropout."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(C) for C in widths)
        self.inner = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        p = 0.5 if self.training else 0.0
        return [norm(self.inner(x)[:, : len(w)].contiguous(), w, p) for w in self.weights]


def norm(x: Tensor, weight: Tensor, dropout_p: float = 0.0) -> Tensor:
    out = layer_norm(x, weight, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out


def classes(*widths: int) -> Classes:
    with record() as found, torch.no_grad():
        Norms(*widths).eval()(torch.randn(1, 64))
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The classes that would be measured, by nobody: PyTorch wins them all."""
    seen: list[Key] = []

    def measure(keys: Any, seconds: float, **how: Any) -> Iterator[supervisor.Outcome]:
        seen.extend(keys)
        for key in keys:
            yield supervisor.Outcome(key, Entry(key, ((1.0, "torch"),)))

    monkeypatch.setattr(supervisor, "measure", measure)
    return seen


def directions(keys: list[Key]) -> set[str]:
    return {key.direction for key in keys}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_model_is_afterwards_as_it_was(train: bool, mode: bool, measured: list[Key]) -> None:
    model = Norms(*WIDTHS).train(mode)
    model.inner.train(not mode)
    first, *others = model.parameters()
    first.grad = kept = torch.full_like(first, 3.0)
    x = torch.randn(4, 64, requires_grad=True)
    x.grad = torch.full_like(x, 2.0)
    before, random = x.grad, torch.get_rng_state()
    report = tune(model, x, train=train)
    assert directions(measured) == {TRAINING if train else FORWARD}
    assert {dict(key.facts)["dropout"] for key in measured} == {train}
    assert len(measured) == len(WIDTHS)
    assert (model.training, model.inner.training) == (mode, not mode)
    assert first.grad is kept
    assert torch.equal(kept, torch.full_like(first, 3.0))
    assert all(parameter.grad is None for parameter in others)
    assert x.grad is before
    assert torch.equal(before, torch.full_like(x, 2.0))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert [entry.key for entry in report.entries] == measured


def test_a_model_that_raises_is_as_it_was(measured: list[Key]) -> None:
    model = Norms(*WIDTHS).eval()
    model.weights[0].grad = kept = torch.ones(WIDTHS[0])
    x, random = torch.randn(64), torch.get_rng_state()
    with pytest.raises(IndexError):
        tune(model, x)
    assert not model.training
    assert model.weights[0].grad is kept
    assert torch.equal(torch.get_rng_state(), random)


def test_a_function_and_inputs_in_a_structure(measured: list[Key]) -> None:
    """Gradients of what a function has from elsewhere are as they were too."""
    x, weight = torch.randn(4, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    weight.grad = kept = torch.full((16,), 2.0)
    tune(lambda batch: {"y": (norm(batch["x"][0], weight), x)}, {"x": [x]})
    assert directions(measured) == {TRAINING}
    assert x.grad is None
    assert weight.grad is kept
    assert torch.equal(kept, torch.full((16,), 2.0))


def test_the_most_work_comes_first(measured: list[Key]) -> None:
    tune(Norms(24, 64, 16, 48), torch.randn(4, 64))
    assert [dict(key.facts)["C"] for key in measured] == [64, 48, 24, 16]


def test_recorded_classes(measured: list[Key]) -> None:
    """Each once, both directions."""
    model = Norms(16)
    with record() as found:
        model(torch.randn(4, 64))
        model(torch.randn(3, 64))
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 64))
        assert not found
    tune(found)
    assert directions(measured) == {TRAINING, FORWARD}
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("variable", "value"), [("GPTKERNELS_TUNE", "off"), ("GPTKERNELS_IMPL", "torch")]
)
def test_what_would_not_be_used_is_not_measured(
    variable: str, value: str, measured: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = classes(16)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is .*nothing"):
        tune(found)
    assert not measured


def test_nothing_to_choose_for(measured: list[Key]) -> None:
    for model in (nn.Linear(4, 4), lambda x: layer_norm(x, torch.ones(4), impl="torch")):
        with pytest.raises(ValueError, match="makes no call that impl='auto' could choose for"):
            tune(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match="makes no call"):
        tune(Classes())


def test_what_was_found_is_used_and_kept(measured: list[Key]) -> None:
    other = Entry(*classes(40), ((1.0, "torch"),))
    plans.use("cpu", Table([other]))
    found: list[supervisor.Outcome] = []
    report = tune(classes(16), found=found.append)
    assert [outcome.entry for outcome in found] == report.entries
    assert set(plans.table("cpu").entries) == {other.key, *measured}
    assert report.path is not None
    assert set(tuned_files.load("cpu").entries) == set(measured)


def test_a_folder_that_cannot_be_written(
    measured: list[Key], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    found = classes(*WIDTHS)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = tune(found)
    (warning,) = warned
    assert "the table is kept for this process alone" in str(warning.message)
    assert warning.filename == __file__
    assert report.path is None
    assert "is a file" in report.trouble
    assert set(plans.table("cpu").entries) == set(measured)


def test_mode_of_compiled_calls(measured: list[Key]) -> None:
    tune(classes(16), compile=True)
    assert [key.mode for key in measured] == [COMPILED]


# ---- with a real child


def test_no_time_for_all() -> None:
    found = classes(*WIDTHS)
    report = tune(found, seconds=0.05)
    assert [dict(entry.key.facts)["C"] for entry in report.entries] == [32]
    assert [dict(key.facts)["C"] for key in report.left] == [24, 16]
    assert not report.cannot
    assert len(tuned_files.load("cpu").entries) == 1


def test_compiled() -> None:
    report = tune(classes(16), compile=True, seconds=30)
    (entry,) = report.entries
    assert entry.key.mode == COMPILED
    assert not entry.refused
    assert {"torch", "cpu"} >= set(entry.points[-1]["times"]) >= {"torch"}
    assert plans.compiled("layer_norm", False, torch.float32, "cpu") == entry.ranges[-1][1]


TUNING = """
import sys
import torch
import gptkernels
from gptkernels.tuning import record
torch.set_num_threads(1)
with record() as classes, torch.no_grad():
    for C in map(int, sys.argv[1:]):
        gptkernels.layer_norm(torch.randn(1, C), torch.ones(C))
print(len(gptkernels.tune(classes, found=lambda o: print("found", flush=True)).entries))
"""


def tuning(*widths: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", TUNING, *map(str, widths)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def children(pid: int) -> list[int]:
    """Processes that this one has started, and which still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="of Linux")


@needs_proc
def test_a_process_that_is_killed_keeps_what_it_found() -> None:
    """And its child ends with it."""
    process = tuning(*range(8, 800, 8))
    assert process.stdout is not None
    assert process.stdout.readline() == "found\n"
    assert process.stdout.readline() == "found\n"
    (child,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(tuned_files.load("cpu").entries) < 90
    ends = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.stdout.close()


def test_two_processes_lose_nothing_of_each_other() -> None:
    both = [tuning(8, 16, 24), tuning(32, 40, 48)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert out.splitlines()[-1] == "3"
    assert sorted(dict(key.facts)["C"] for key in tuned_files.load("cpu").entries) == [
        8, 16, 24, 32, 40, 48,
    ]  # fmt: skip


@needs_proc
@pytest.mark.parametrize("where", ["found", "trying"])
def test_control_c_ends_the_child(where: str) -> None:
    def interrupted(*given: Any) -> None:
        (child,) = set(children(os.getpid())) - before
        started.append(child)
        raise KeyboardInterrupt

    started: list[int] = []
    before = set(children(os.getpid()))
    found = classes(*WIDTHS)
    with pytest.raises(KeyboardInterrupt) as raised:
        tune(found, **{where: interrupted})
    (child,) = started
    assert not is_running(child)  # while the error, with all its frames, is still here
    assert raised.value
    assert len(tuned_files.load("cpu").entries) == (where == "found")


def test_refused_of_a_report() -> None:
    key = classes(16)[0]
    report = Report([Entry(key, ((1.0, "torch"),), (), {"cpu": "it is wrong"})])
    assert report.refused == [(key, "cpu", "it is wrong")]
    assert key.mode == EAGER
