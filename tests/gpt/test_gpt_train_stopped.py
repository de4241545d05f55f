"""A run that a signal stops: at once, and resumed it ends as one that was not stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training import SHORT, TINY, assert_same_bits, read_log, unclocked

from gptkernels.core.lock import alone_in
from gptkernels.gpt.training import checkpoint, sampling
from gptkernels.gpt.training.learner import Learner
from gptkernels.gpt.training.observer import Plan, Watcher
from gptkernels.gpt.training.run import Run
from gptkernels.gpt.training.stopping import Stopped, Stopping
from gptkernels.gpt.training.train import TrainResult, resume, train

pytest.importorskip("matplotlib", reason="needs the package matplotlib")
pytest.importorskip("safetensors", reason="needs the package safetensors")
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's"),
    pytest.mark.usefixtures("undrawn"),
]

# Two micro-batches a step, and four batches a validation, two of them of the average: the model is
# called 1-4 (step 0), 5-12 (steps 1-4), 13-16 (step 4), 17-24 (steps 5-8) and 25-28 (step 8).
CONFIG = dataclasses.replace(
    SHORT, steps=8, ema=0.5, sample_interval=4, sample_tokens=4, snapshot_interval=4,
    validation_fraction=0.2,
)  # fmt: skip
DUE = ["validation", "sample", "snapshot", "checkpoint"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose second epoch begins in the first micro-batch of step 6."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man in want.\n" * 14)
    return path


@pytest.fixture(scope="module")
def whole(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptkernels.gpt.training.run.draw_losses", lambda records, path: None)
        train([short], out, model=TINY, config=CONFIG)
    return out


def kill_in(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Send SIGINT during a call of a function, counted from 1."""
    function, calls = getattr(owner, name), 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    patch.setattr(owner, name, killing)


PLACES: dict[str, tuple[Any, str, int, int, list[str]]] = {
    # where, in which call of it; the step that is then in the checkpoint, and what is due there
    "first validation": (Learner, "_loss", 1, 0, ["validation", "snapshot"]),
    "first validation, average": (Learner, "_loss", 3, 0, ["validation", "snapshot"]),
    "first micro-batch": (Learner, "_loss", 5, 0, []),
    "last micro-batch": (Learner, "_loss", 10, 3, []),
    "validation": (Learner, "_loss", 13, 4, DUE[:3]),
    "first token of a sample": (sampling, "stream", 1, 4, ["sample", "snapshot"]),
    "snapshot": (Run, "_save_model", 2, 4, []),
    "step that begins an epoch": (Learner, "_loss", 17, 4, []),
    "last validation": (
        Learner,
        "_loss",
        25,
        8,
        ["validation", "sample", "snapshot", "checkpoint"],
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(
    short: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    owner, name, call, step, due = PLACES[place]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_in(patch, owner, name, call)
        stopped = train([short], out, model=TINY, config=CONFIG)
    assert stopped.stopped
    assert all(parameter.grad is None for parameter in stopped.model.parameters())
    content = checkpoint.load(out / "checkpoint.pt")
    assert (content["step"], list(content["due"])) == (step, due)
    # As a run that was killed on its way, which had already made what was due.
    with (out / "log.jsonl").open("a") as log:
        made = [what for what in due if what in ("validation", "sample")]
        log.writelines(f'{{"step": {step}, "{what}": 1}}\n' for what in made)
        log.write(f'{{"step": {step + 1}}}\n')
    torch.rand(7)
    resumed = resume(out)
    assert not resumed.stopped
    assert unclocked(read_log(out)) == unclocked(read_log(whole))
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (whole, out))
    for key in ("model", "average", "random"):
        assert_same_bits(flat(a[key]), flat(b[key]))
    assert torch.equal(a["sampler"]["generator"], b["sampler"]["generator"])
    for key in ("sampler", "best_validation_loss", "step", "tokens", "due"):
        a[key], b[key] = (without_generator(content[key]) for content in (a, b))
        assert a[key] == b[key]
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors")):
        assert (out / path).read_bytes() == (whole / path).read_bytes()


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def without_generator(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: one for name, one in value.items() if name != "generator"}


def test_what_is_no_longer_asked_for_is_no_longer_due(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_in(patch, Learner, "_loss", 13)
        train([short], out, model=TINY, config=CONFIG)
    resume(out, sample_interval=0, snapshot_interval=0)
    assert not any("sample" in record for record in read_log(out))
    assert [path.name for path in (out / "snapshots").iterdir()] == ["0"]


def test_a_step_that_is_given_up_costs_a_micro_batch(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty, and it is said at once that the signal was heard."""
    calls: list[str] = []
    loss = Learner._loss

    def counted(self: Learner, *given: Any) -> Any:
        calls.append("micro-batch")
        return loss(self, *given)

    class Listening(Watcher):
        def stopping(self) -> None:
            calls.append("heard")

    monkeypatch.setattr(Learner, "_loss", counted)
    kill_in(monkeypatch, Learner, "_loss", 5)
    config = dataclasses.replace(SHORT, accumulation=20)
    result = train([short], tmp_path / "out", model=TINY, config=config, observer=Listening())
    assert result.stopped
    assert calls == ["micro-batch"] * 4 + ["heard", "micro-batch"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_acts_as_outside() -> None:
    heard: list[bool] = []
    with Stopping(lambda: heard.append(True)) as stopping:
        stopping.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            stopping.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert heard == [True]


@pytest.mark.parametrize(
    "due", [{"dinner": True}, {"validation": True}, {"validation": {"step": 3}}], ids=str
)
def test_what_cannot_be_due_is_refused(
    finished: tuple[Path, TrainResult], tmp_path: Path, due: dict[str, Any]
) -> None:
    content = checkpoint.load(finished[0] / "checkpoint.pt")
    checkpoint.save(tmp_path / "checkpoint.pt", {**content, "due": due})
    with pytest.raises(ValueError, match="has a due that is not of its step"):
        resume(tmp_path, steps=14)


# ---- what is left to do


def state_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_is_left_as_it_is(
    finished: tuple[Path, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = finished
    before = state_of(out)
    monkeypatch.setattr("gptkernels.gpt.training.data.read", None)  # not even the text is read
    again = resume(out)
    assert again.nothing_left == "12 of 12 steps"
    assert state_of(out) == before
    assert_same_bits(again.model.state_dict(), result.model.state_dict())
    assert (again.model.training, result.model.training) == (False, False)
    assert (again.records, again.petaflop_s_days) == (result.records, result.petaflop_s_days)
    with pytest.raises(ValueError, match="steps is 11, but 12 were made already: ask for more"):
        resume(out, steps=11)
    assert state_of(out) == before


def test_a_run_killed_before_it_wrote_its_model_is_not_finished(
    short: Path, whole: Path, tmp_path: Path
) -> None:
    """The folder then has the model of the run before it was prolonged, or none."""
    out = tmp_path / "out"
    train([short], out, model=TINY, config=dataclasses.replace(CONFIG, steps=6))
    (out / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    assert not resume(out).nothing_left
    for name in ("model", "model-ema"):
        files = [folder / name / "model.safetensors" for folder in (out, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert resume(out).nothing_left == "8 of 8 steps"


def test_a_run_of_minutes_is_done_when_they_are_over(short: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = dataclasses.replace(SHORT, steps=10**6, minutes=0.01)
    train([short], out, model=TINY, config=config)
    content = checkpoint.load(out / "checkpoint.pt")
    checkpoint.save(out / "checkpoint.pt", {**content, "seconds": 0.7})
    assert resume(out).nothing_left == "0.01 of 0.01 minutes"
    checkpoint.save(out / "checkpoint.pt", {**content, "seconds": 90.0})
    assert resume(out).nothing_left == "1.5 of 0.01 minutes"
    with pytest.raises(ValueError, match=r"minutes is 1.0, but 1.5 were made already"):
        resume(out, minutes=1.0)


def test_a_folder_in_use_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone_in("out", out), pytest.raises(ValueError, match="is in use by"):
        train([tmp_path / "nothing.txt"], out, model=TINY, config=SHORT)


# ---- what an observer hears


def test_a_watcher_hears_of_everything_and_a_function_of_records(
    short: Path, tmp_path: Path
) -> None:
    heard: list[Any] = []

    class Listening(Watcher):
        def begins(self, plan: Plan) -> None:
            heard.append(plan)

        def __call__(self, record: dict[str, Any], done: float) -> None:
            heard.append(("record", record["step"], done))

        def stepped(self, step: int, done: float, left_s: float | None) -> None:
            heard.append(("step", step, done))

    config = dataclasses.replace(SHORT, steps=2)
    train([short], tmp_path / "a", model=TINY, config=config, observer=Listening())
    plan, *others = heard
    assert (plan.shape, plan.config.steps, plan.step, plan.tokens) == (TINY, 2, 0, 2 * 2 * 4 * 16)
    assert plan.training_tokens + plan.validation_tokens == short.stat().st_size
    assert others == [("record", 0, 0.0), ("step", 1, 0.5), ("record", 2, 1.0), ("step", 2, 1.0)]
    seen: list[Any] = []

    def observer(record: dict[str, Any], done: float) -> None:
        seen.append(("record", record["step"], done))

    train([short], tmp_path / "b", model=TINY, config=config, observer=observer)
    assert seen == [one for one in others if one[0] == "record"]
