"""Steps that begin small: how many micro-batches each has, what is counted, and resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import SHORT, TINY, Interrupted, assert_same_bits, interrupt_at, unclocked

from gptkernels.gpt.training.config import TrainConfig, growth_at, micro_batches
from gptkernels.gpt.training.learner import Learner
from gptkernels.gpt.training.train import resume, train

pytest.importorskip("matplotlib", reason="needs the package matplotlib")
pytest.importorskip("safetensors", reason="needs the package safetensors")

pytestmark = pytest.mark.usefixtures("undrawn")

MICRO = 4 * 16  # tokens
SMALL = dataclasses.replace(TINY, n_layer=1)
RAMPED = dataclasses.replace(
    SHORT, steps=10, accumulation=5, ramp_start=2, ramp_tokens=20 * MICRO, log_interval=1
)


@given(st.data())
def test_micro_batches_grow_linearly_in_tokens(data: st.DataObject) -> None:
    most = data.draw(st.integers(2, 5000))
    first = data.draw(st.integers(1, most - 1))
    length = data.draw(st.integers(1, 12 * 10**9))
    tokens = data.draw(st.integers(0, length - 1))
    config = TrainConfig(accumulation=most, ramp_start=first, ramp_tokens=length)
    found = micro_batches(config, tokens)
    exact = first + (most - first) * (tokens / length)
    assert exact - 1 - 1e-6 < found <= exact + 1e-6
    assert found <= micro_batches(config, tokens + data.draw(st.integers(0, length)))
    assert micro_batches(config, 0) == first
    more = data.draw(st.integers(first + 1, most))
    grown = growth_at(config, more)
    assert micro_batches(config, grown - 1) < more <= micro_batches(config, grown)
    for after in (length, 2 * length):
        assert micro_batches(config, after) == most
    assert micro_batches(TrainConfig(accumulation=most), tokens) == most


def test_a_run_counts_what_it_was_trained_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0
    loss = Learner._loss

    def spy(self: Learner, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal drawn
        drawn += self.model.training * tokens.numel()
        return loss(self, tokens, targets)

    monkeypatch.setattr(Learner, "_loss", spy)
    records = train([text], tmp_path / "run", model=SMALL, config=RAMPED).records[1:]
    # 2 + 3 * (0, 2, 4, 6, 8, 11, 14, 18, 22, ...) / 20
    batches = [record["batch_tokens"] // MICRO for record in records]
    assert batches == [2, 2, 2, 2, 3, 3, 4, 4, 5, 5]
    for i, record in enumerate(records):
        assert record["batch_tokens"] % MICRO == 0
        assert record["tokens"] == MICRO * sum(batches[: i + 1])
        one = records[0]["petaflop_s_days"] / records[0]["tokens"]
        assert record["petaflop_s_days"] == pytest.approx(one * record["tokens"])
    assert records[-1]["tokens"] == drawn


def test_a_ramp_resumes_to_the_same_bits(text: Path, tmp_path: Path) -> None:
    whole = train([text], tmp_path / "whole", model=SMALL, config=RAMPED)
    with pytest.raises(Interrupted):
        train([text], tmp_path / "part", model=SMALL, config=RAMPED, observer=interrupt_at(8))
    resumed = resume(tmp_path / "part")  # from step 6, where a step has 4 micro-batches
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert unclocked(whole.records) == unclocked(resumed.records)


def test_a_checkpoint_of_before_there_were_ramps_resumes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train([text], out, model=TINY, config=dataclasses.replace(SHORT, steps=1))
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    settings = content["train_config"]
    for setting in ("ramp_tokens", "ramp_start", "decay_steps"):
        del settings[setting]
    settings.update(learning_rate=1e-3, min_learning_rate=1e-4)  # None was not yet known
    torch.save(content, out / "checkpoint.pt")
    assert resume(out, steps=2).records[-1]["tokens"] == 2 * 2 * MICRO


def test_a_ramp_that_begins_above_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="ramp_start is 3, at most accumulation=2 is wanted"):
        TrainConfig(accumulation=2, ramp_start=3)
    with pytest.raises(ValueError, match="ramp_tokens is -1, at least 0 is wanted"):
        TrainConfig(ramp_tokens=-1)


def test_a_ramp_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match="ramp_start is 2, 1 without ramp_tokens is wanted"):
        TrainConfig(accumulation=4, ramp_start=2)
    alike = r"ramp_tokens is 10, 0 for steps that do not grow \(ramp_start=accumulation={}\)"
    with pytest.raises(ValueError, match=alike.format(1)):
        TrainConfig(ramp_tokens=10)
    with pytest.raises(ValueError, match=alike.format(3)):
        TrainConfig(accumulation=3, ramp_start=3, ramp_tokens=10)
