"""The examples, run as their first lines say."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from harness import ROOT, command

NEEDS = {
    "finetune_gpt2": ("transformers", "accelerate"),
    "lora_gpt2": ("transformers", "peft"),
    "nanogpt": (),
}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_learns(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "README.md").read_bytes() * 4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    environment["GPTKERNELS_EMULATE"] = "0"
    environment["OMP_NUM_THREADS"] = "1"  # other tests run beside it
    result = command(
        sys.executable, "-W", "ignore", path, text, cwd=tmp_path, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "gptkernels, impl='auto'" in result.stdout
    losses = [float(found) for found in re.findall(r"loss'?:? '?([0-9.]+)", result.stdout)]
    assert losses[-1] < losses[0]


def test_a_model_written_for_flash_attn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns, and its cache gives what the whole text gives."""
    path = ROOT / "examples" / "from_flash_attn.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(ROOT / "README.md")])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([0-9.]+)", printed)]
    assert losses[-1] < losses[0]
    (apart,) = re.findall(r"without: (\S+) apart", printed)
    assert float(apart) < 1e-4
