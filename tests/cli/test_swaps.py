"""`gptkernels info FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import LANGUAGE_MODELS, Size

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX"])
def test_the_report_of_a_folder(family: str, tmp_path: Path, call: Any) -> None:
    """As of the model itself, without its weights."""
    model = LANGUAGE_MODELS[family](Size())
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    result = call("info", str(tmp_path))
    assert result.code == 0, result.err
    assert result.out.startswith("gptkernels, impl='auto': ")
    assert "linear, GELU, linear as one op" in result.out
    assert " 0 left alone" in result.out


def test_folders_that_are_refused(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has no config.json" in call("info", str(tmp_path)).err
    assert "a folder that exists" in call("info", str(tmp_path / "nowhere")).err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    result = call("info", str(tmp_path))
    assert result.code != 0
    assert "transformers does not know the model" in result.err
    assert len(result.err.strip().splitlines()) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in call("info", str(tmp_path)).err
