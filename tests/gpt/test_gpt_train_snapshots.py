"""The copies of its model that a training run keeps along the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training import SHORT, TINY, assert_same_bits, unclocked

from gptkernels import GPT
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.train import resume, train

pytest.importorskip("matplotlib", reason="needs the package matplotlib")
pytest.importorskip("safetensors", reason="needs the package safetensors")

KEPT = dataclasses.replace(SHORT, snapshot_interval=5)


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "snapshots").iterdir())


def test_a_run_keeps_its_first_and_last_model_and_those_between(text: Path, tmp_path: Path) -> None:
    plain = train([text], tmp_path / "plain", model=TINY, config=SHORT)
    kept = train([text], tmp_path / "kept", model=TINY, config=KEPT)
    assert not (tmp_path / "plain" / "snapshots").exists()
    assert steps_of(tmp_path / "kept") == [0, 5, 10, 12]
    assert_same_bits(plain.model.state_dict(), kept.model.state_dict())
    assert unclocked(plain.records) == unclocked(kept.records)

    snapshots = [
        GPT.from_pretrained(tmp_path / "kept" / "snapshots" / str(step)).state_dict()
        for step in (0, 5, 10, 12)
    ]
    torch.manual_seed(SHORT.seed)
    assert_same_bits(snapshots[0], GPT(TINY).state_dict())
    assert_same_bits(snapshots[-1], kept.model.state_dict())
    name = "transformer.wte.weight"
    assert not any(
        torch.equal(a[name], b[name]) for i, a in enumerate(snapshots) for b in snapshots[:i]
    )


def test_a_snapshot_is_the_model_of_its_step(text: Path, tmp_path: Path) -> None:
    # A constant rate, so that six steps of twelve are those of a run of six.
    flat = dataclasses.replace(
        SHORT, snapshot_interval=6, learning_rate=1e-3, min_learning_rate=1e-3
    )
    train([text], tmp_path / "twelve", model=TINY, config=flat)
    six = train([text], tmp_path / "six", model=TINY, config=dataclasses.replace(flat, steps=6))
    snapshot = GPT.from_pretrained(tmp_path / "twelve" / "snapshots" / "6")
    assert_same_bits(snapshot.state_dict(), six.model.state_dict())


def test_a_checkpoint_of_before_there_were_snapshots_resumes(text: Path, tmp_path: Path) -> None:
    whole = train([text], tmp_path / "whole", model=TINY, config=SHORT)
    out = tmp_path / "part"
    train([text], out, model=TINY, config=dataclasses.replace(SHORT, steps=6))
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    del content["train_config"]["snapshot_interval"]
    torch.save(content, out / "checkpoint.pt")
    resumed = resume(out, steps=SHORT.steps)
    assert resumed.records[-1]["step"] == whole.records[-1]["step"]
    assert not (out / "snapshots").exists()


def test_a_resumed_run_goes_on_keeping_them(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train([text], out, model=TINY, config=dataclasses.replace(KEPT, steps=5))
    assert steps_of(out) == [0, 5]
    resume(out, steps=12)
    assert steps_of(out) == [0, 5, 10, 12]


def test_an_interval_below_none_is_refused() -> None:
    with pytest.raises(ValueError, match="snapshot_interval is -1, at least 0 is wanted"):
        TrainConfig(snapshot_interval=-1)
