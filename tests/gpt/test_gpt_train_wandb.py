"""Weights & Biases: all records go there, a resumed run goes on, and what is missing is told."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import SHORT, TINY, Interrupted, interrupt_at

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.train import resume, train

LOGGED = dataclasses.replace(SHORT, wandb=True, sample_interval=12)


def test_a_run_and_what_goes_on_with_it_are_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, each of the two leaves a file of its own, whose records stand there as JSON."""
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train([text], out, model=TINY, config=LOGGED, observer=interrupt_at(8))
    result = resume(out)
    wandb.teardown()  # its own process ends, and has written everything
    files = [*out.glob("wandb/offline-*/run-*.wandb")]
    key = (out / "wandb" / "id").read_text()
    assert [path.stem for path in files] == [f"run-{key}"] * 2
    contents = [path.read_bytes() for path in files]
    written = b"".join(contents)
    for record in result.records:
        for value in record.values():
            if isinstance(value, float):
                assert json.dumps(value).encode() in written
    for content in contents:
        assert len(content) < 2**15  # a larger one is cut into blocks, in the middle of records
        assert b"n_embd" in content
        assert b"weight_decay" in content
        assert str(text).encode() in content


class Refused(Exception):
    """What wandb raises."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A wandb that notes how runs are begun, under an id of its own where none is given."""
    begun: list[dict[str, Any]] = []

    def init(**how: Any) -> Any:
        begun.append(how)
        if how["project"] == "refused":
            raise Refused("No API key configured.\nUse another line.")
        run = SimpleNamespace(id=how["id"] or f"new{len(begun)}")
        run.define_metric = lambda name, step_metric: how.update(metric=(name, step_metric))
        run.log = lambda record: how.setdefault("records", []).append(record)
        run.finish = lambda: how.update(finished=True)
        return run

    module = SimpleNamespace(init=init, Error=Refused, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return begun


def test_what_is_said_of_a_run(
    text: Path, tmp_path: Path, fake: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    config = dataclasses.replace(LOGGED, steps=4)
    train([text], out, model=TINY, config=config)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    result = resume(out, steps=8)
    first, second = fake
    assert [one["id"] for one in fake] == [None, "new1"]
    assert [one["project"] for one in fake] == ["gptkernels", "theirs"]
    for one in fake:
        assert (one["name"], one["dir"], one["resume"]) == ("run", out, "allow")
        assert one["metric"] == ("*", "step")
        assert one["finished"]
        assert one["config"]["model"] == dataclasses.asdict(TINY)
        assert one["config"]["files"] == [str(text)]
    assert second["config"]["training"] == dataclasses.asdict(
        dataclasses.replace(config, steps=8, tokenizer="bytes", token_dtype="uint16")
    )
    without_none = [{k: v for k, v in r.items() if v is not None} for r in result.records]
    assert first["records"] + second["records"] == without_none


def test_a_run_may_leave_its_project(
    text: Path, tmp_path: Path, fake: list[dict[str, Any]]
) -> None:
    config = dataclasses.replace(LOGGED, steps=4, wandb_project="mine")
    train([text], tmp_path / "run", model=TINY, config=config)
    assert not resume(tmp_path / "run", steps=8, wandb=False).nothing_left
    with pytest.raises(ValueError, match="wandb_project is 'a', none without wandb is wanted"):
        resume(tmp_path / "run", wandb_project="a")
    assert [one["project"] for one in fake] == ["mine"]


def test_a_new_run_in_an_old_folder_has_a_new_id(
    text: Path, tmp_path: Path, fake: list[dict[str, Any]]
) -> None:
    for _ in range(2):
        with pytest.raises(Interrupted):  # before there is a checkpoint
            train([text], tmp_path / "run", model=TINY, config=LOGGED, observer=interrupt_at(0))
    assert [one["id"] for one in fake] == [None, None]


def test_what_wandb_refuses_is_one_sentence(
    text: Path, tmp_path: Path, fake: list[dict[str, Any]]
) -> None:
    config = dataclasses.replace(LOGGED, wandb_project="refused")
    with pytest.raises(RuntimeError, match=r"^wandb: No API key configured\.$"):
        train([text], tmp_path / "run", model=TINY, config=config)
    assert not (tmp_path / "run").exists()


def test_without_wandb_it_is_one_sentence_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "text").touch()  # which nobody has read yet: it is empty
    with pytest.raises(ImportError, match=r"needs wandb: pip install 'gptkernels\[wandb\]'$"):
        train([tmp_path / "text"], tmp_path / "run", model=TINY, config=LOGGED)
    assert not (tmp_path / "run").exists()


def test_a_project_goes_with_wandb_alone() -> None:
    with pytest.raises(ValueError, match="wandb_project is 'a', none without wandb is wanted"):
        TrainConfig(wandb_project="a")
