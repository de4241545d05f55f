"""A name of the Hugging Face hub where a folder is wanted: nothing is downloaded, and the command
that does it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli import assert_refused


@pytest.mark.parametrize(
    "given",
    [
        "generate gpt2 --prompt x",
        "evaluate gpt2 text.txt",
        "train text.txt --out out --init gpt2",
        "tune gpt2",
        "info gpt2",
    ],
)
def test_the_command_that_downloads_it_is_named(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text " * 50)
    result = call(*given.split())
    assert_refused(result, "gpt2", "hf download openai-community/gpt2 ", " --local-dir gpt2)")
    assert ("; for the shape alone: --config gpt2" in result.err) == given.startswith("tune")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_other_names_are_no_models_of_the_hub(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("generate run --prompt x", "tune gpt3-125M", "info run"):
        result = call(*given.split())
        assert result.code == 2
        assert "hf download" not in result.err
    assert "--config" not in call("tune", "run").err
    assert "--config gpt3-125M" in call("tune", "gpt3-125M").err
