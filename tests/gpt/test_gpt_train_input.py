"""Settings and files that training refuses, in one sentence and without leaving a folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from training import SHORT, TINY

from gptkernels.core.lock import alone_in
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.train import TrainResult, resume, train


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, at least 1 is wanted"),
        ({"steps": 2.5}, TypeError, "steps is 2.5, int is wanted"),
        ({"batch_size": True}, TypeError, "batch_size is True, int is wanted"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0, more than 0 is wanted"),
        ({"learning_rate": math.nan}, ValueError, "a finite number is wanted"),
        ({"min_learning_rate": 1.0}, ValueError, "at most learning_rate=0.001 is wanted"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1.0, in \[0, 1\) is wanted"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808, less than 2"),
        ({"validation_fraction": 1.0}, ValueError, "between 0 and 1 is wanted"),
        ({"minutes": 0}, ValueError, "minutes is 0, more than 0 is wanted"),
        ({"dtype": "float64"}, ValueError, "'float64', float32, bfloat16 or float16 is wanted"),
        ({"tokenizer": 3}, TypeError, "tokenizer is 3, str is wanted"),
    ],
)
def test_settings_out_of_range_are_refused(
    setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**setting)


def test_at_least_one_epoch_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train([], tmp_path, model=TINY, epochs=0)


def test_every_setting_has_a_help_text() -> None:
    assert all(option.metadata["help"] for option in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "tpu9"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:97"}, "device is 'cuda:97', but this machine has"),
        ({"tokenizer": "words"}, "tokenizer name must be"),
        ({"impl": "magic"}, "impl"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(
    text: Path, tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train([text], tmp_path / "out", model=TINY, config=dataclasses.replace(SHORT, **setting))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib.figure", "safetensors"])
def test_a_missing_package_is_noticed_before_the_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install 'gptkernels"):
        train([text], tmp_path / "out", model=TINY, config=SHORT)
    assert not (tmp_path / "out").exists()


def test_vocabulary_too_small_and_missing_text_are_refused(text: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(TINY, vocab_size=255)
    with pytest.raises(ValueError, match=r"vocab_size is 255, but the tokenizer 'bytes' has 256"):
        train([text], tmp_path / "out", model=small, config=SHORT)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train([tmp_path / "no.txt"], tmp_path / "out", model=TINY, config=SHORT)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_checkpoint_is_not_overwritten(
    finished: tuple[Path, TrainResult], text: Path
) -> None:
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        train([text], out, model=TINY, config=SHORT)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_folder_has_one_run_at_a_time(
    finished: tuple[Path, TrainResult], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with (
        alone_in("out", tmp_path / "run"),  # as another run would
        pytest.raises(ValueError, match=r"^out: \S+/run is in use by process \d+ on "),
    ):
        resume(tmp_path / "run", steps=14)
    with (
        alone_in("out", tmp_path / "new"),
        pytest.raises(ValueError, match=r"^out: \S+/new is in use by process"),
    ):
        train([text], tmp_path / "new", model=TINY, config=SHORT)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist"):
        resume(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_out_must_be_a_folder(text: Path) -> None:
    for out in (text, text / "run"):
        with pytest.raises(NotADirectoryError, match=r"^out must be a folder, but \S+ is a file$"):
            train([text], out, model=TINY, config=SHORT)


def test_resume_refuses_another_text_and_late_changes(
    finished: tuple[Path, TrainResult], text: Path
) -> None:
    out, _ = finished
    with pytest.raises(ValueError, match="is not the text that the run to resume was trained on"):
        resume(out, files=[text])
    with pytest.raises(ValueError, match="seed is 5, but the run to resume has 1337"):
        resume(out, seed=5)
    with pytest.raises(TypeError, match="colour is not a setting of training"):
        resume(out, colour="red")
