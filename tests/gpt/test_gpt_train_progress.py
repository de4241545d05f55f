"""What a person sees of a training run, and how long it is said to take."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from itertools import count
from typing import Any

import pytest
import torch
from rich.console import Console
from training import SHORT, TINY

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.progress import Bar, duration
from gptkernels.gpt.training.config import TrainConfig, micro_batches, tokens_of_steps
from gptkernels.gpt.training.observer import Plan
from gptkernels.gpt.training.progress import ProgressBar, summary
from gptkernels.gpt.training.throughput import Pace

CPU = torch.device("cpu")


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def plan_of(config: TrainConfig, shape: GPTConfig = TINY, step: int = 0) -> Plan:
    return Plan(shape, config, 31_000, "bytes", CPU, 2**20, 10**5, step, 3 * 2**20)


def test_a_run_is_described_in_lines_that_fit() -> None:
    lines = list(summary(plan_of(SHORT)))
    assert lines[:3] == [
        "model     31,000 parameters, vocabulary 256 (bytes)",
        "          2 layers, 2 heads, width 32, context 16",
        "text      1,048,576 tokens, and 100,000 to validate on",
    ]
    assert lines[3].startswith("machine   CPU, ")
    assert lines[3].endswith("; float32, impl torch")
    assert lines[4] == "training  12 steps of 128 tokens, 3.0 epochs"
    ramp = dataclasses.replace(SHORT, steps=10**6, ramp_tokens=10**9, accumulation=512, minutes=2)
    *_, first, then = summary(plan_of(ramp))
    assert first == "training  2 minutes, at most 1,000,000 steps of 64 tokens at first,"
    assert then == "          after 1,000,000,000 of 32,768 tokens"
    resumed = dataclasses.replace(SHORT, steps=10**6)
    *_, last = lines = list(summary(plan_of(resumed, GPTConfig.named("gpt3-175B"), 5)))
    assert last == "training  steps 6 to 1,000,000, of 16,384 tokens, 3.0 epochs"
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("ramp_tokens", [0, 1, 1000, 5000])
def test_the_tokens_of_steps_are_those_that_each_of_them_has(ramp_tokens: int) -> None:
    config = TrainConfig(ramp_tokens=ramp_tokens, accumulation=7, batch_size=3)
    for before in (0, 100, 900, 10_000):
        seen = before
        for steps in range(40):
            assert tokens_of_steps(config, steps, before, 11) == seen - before
            seen += 11 * micro_batches(config, seen)


def test_the_rest_is_reckoned_from_steps_and_validations_apart(clock: Clock) -> None:
    pace = Pace()

    def spend(seconds: float) -> None:
        clock.now += seconds

    with pace.validation():
        spend(6.0)
    spend(50.0)  # the first step compiles
    pace.stepped(10)
    assert pace.left_s(100, 0) is None
    spend(1.0)
    pace.stepped(10)
    assert pace.left_s(100, 0) is None  # too little was seen
    with pace.validation():
        spend(4.0)
    spend(1.5)
    pace.stepped(10)
    assert pace.left_s(100, 3) == pytest.approx(100 * 2.5 / 20 + 3 * 5.0)
    with contextlib.suppress(ZeroDivisionError), pace.validation():
        spend(1 / 0)
    assert pace.left_s(0, 1) == pytest.approx(5.0)  # one that was given up does not count


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.4, "3 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (7800, "2 h 10 min"),
     (400_000, "5 days")],
)  # fmt: skip
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_pipe_has_a_line_every_few_seconds_and_none_twice(clock: Clock) -> None:
    shown = io.StringIO()
    record = {"loss": 2.5, "tokens_per_s": 12_345.0, "mfu": 0.41, "activation_bytes": 2**20}
    with ProgressBar(Console(file=shown, width=200), "opening", "buy a GPU") as bar:
        bar.begins(plan_of(SHORT))
        assert shown.getvalue().startswith("opening\nmodel ")
        clock.now += 7
        bar({"step": 0, "validation_loss": 5.5}, 0.0)
        for step in range(1, 1001):
            clock.now += 0.125
            left_s = None if step < 30 else (1000 - step) / 8
            if step % 10 == 0:
                more = {"validation_loss": 2.25} if step % 200 == 0 else {}
                bar({"step": step, **record, **more}, step / 1000)
            bar.stepped(step, step / 1000, left_s)
    lines = shown.getvalue().splitlines()[6:]
    assert lines[0] == "  0%  step 0  validation loss 5.5000"
    assert lines[1] == "memory    1.0 MiB of activations in a micro-batch"
    assert lines[2] == "time      about 2 min; buy a GPU"
    assert lines[3] == "  4%  step 40  loss 2.5000  12,345 tokens/s  2 min left"
    assert lines[-1] == "100%  step 1,000  loss 2.5000  validation loss 2.2500  MFU 41.0%"
    assert len(lines) in range(3 + 5 + 15, 3 + 5 + 21)  # 25 s between two of the 5 validations
    steps = [line.split("  ")[1 + line.startswith("  ")] for line in lines[3:]]
    assert len(set(steps)) == len(steps)
    assert max(map(len, lines)) < 80


def test_a_long_run_has_fewer_lines(clock: Clock) -> None:
    shown = io.StringIO()
    with Bar(Console(file=shown, width=200), every_s=5.0) as bar:
        for step in range(5000):
            clock.now += 20
            bar.show("step", step / 5000)
    assert 60 < len(shown.getvalue().splitlines()) < 200


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_terminal_the_bar_has_the_time_that_is_left(width: int) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, color_system=None)
    with ProgressBar(console) as bar:
        bar({"step": 1_000, "loss": 2.5, "tokens_per_s": 12_345.0}, 0.5)
        bar.stepped(1_001, 0.5, 90.0)
        bar.stopping()
    assert "step 1,001" in shown.getvalue()
    assert "loss 2.5000  12,345 tokens/s 2 min left" in shown.getvalue()
    assert shown.getvalue().count("once more stops now") == 1


def test_the_signal_is_answered_on_stderr_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressBar(Console(file=io.StringIO())) as bar:
        bar.stopping()
    assert capsys.readouterr().err == "stopping; once more stops now\n"


def test_a_bar_reckons_the_time_by_what_is_done(clock: Clock) -> None:
    """From where it began: a resumed run has done the first half before."""
    shown: list[Any] = []
    bar = Bar(Console(file=io.StringIO(), width=200), every_s=0.0)
    bar.console.print = lambda text, **_: shown.append(text)  # type: ignore[method-assign]
    for step in count(50):
        bar.show(f"step {step}", step / 100)
        clock.now += 1.0
        if step == 60:
            break
    assert shown[-1] == " 60%  step 60  40 s left"


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_the_name_of_a_file_are_shown(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=terminal, color_system=None)
    with Bar(console, every_s=0.0) as bar:
        bar.show("notes [draft] [/b].txt", 0.5)
    assert "notes [draft] [/b].txt" in shown.getvalue()


def test_a_record_shows_the_time_that_the_run_reckons(clock: Clock) -> None:
    """Not that of the share of the steps: later ones may be larger."""
    shown = io.StringIO()
    with ProgressBar(Console(file=shown, width=200)) as bar:
        bar.stepped(1, 0.1, 600.0)
        clock.now += 10
        bar({"step": 2, "loss": 2.5}, 0.2)
    assert shown.getvalue().splitlines()[-1] == " 20%  step 2  loss 2.5000  10 min left"
