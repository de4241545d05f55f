"""A text, a finished run and a folder of Hugging Face's, each made once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training import SHORT, TINY

from gptkernels.gpt.training.train import TrainResult, train


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man in want.\n" * 60)
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no picture, which takes longer than they do."""
    monkeypatch.setattr("gptkernels.gpt.training.run.draw_losses", lambda records, path: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """Its folder, which nobody changes."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 80)
    seen: list[float] = []
    result = train(
        [folder / "text.txt"],
        folder / "out",
        model=TINY,
        config=SHORT,
        observer=lambda record, done: seen.append(done),
    )
    assert seen == [record["step"] / SHORT.steps for record in result.records]
    return folder / "out", result


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote, which nobody changes."""
    from hf_folders import theirs  # skips without transformers

    folder = tmp_path_factory.mktemp("theirs")
    theirs().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"
