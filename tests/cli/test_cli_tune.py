"""The command `gptkernels tune`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from test_cli import assert_refused

from gptkernels import GPT, GPTConfig
from gptkernels.cli import tune_table
from gptkernels.core import plans
from gptkernels.core.tuned import FORWARD, TRAINING, Key

OPS = {"attention", "gelu_mlp", "layer_norm", "linear_cross_entropy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=32)
    GPT(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_table() -> Any:
    plans.use("cpu", None)
    yield
    plans.use("cpu", None)


def program(home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`gptkernels tune` of a user who has nothing but an empty home."""
    left_out = ("GPTKERNELS_TUNE", "GPTKERNELS_CACHE", "XDG_CACHE_HOME", "GPTKERNELS_IMPL")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base = (sys.executable, "-m", "gptkernels", "tune", "--device", "cpu")
    return command(*base, *words, env=env, timeout=240)


def kept(home: Path) -> list[Path]:
    return sorted(home.rglob("*.jsonl"))


def test_tune_then_explain_then_prove(folder: Path, tmp_path: Path) -> None:
    """A short training step in fp32."""
    path = tmp_path / "rows.json"
    how = ("--batch", "1", "--tokens", "4", "--dtype", "fp32", "--json", path)
    tuned = program(tmp_path, folder, *how)
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stderr == ""
    assert_measured(tuned.stdout, kept(tmp_path), tmp_path)
    assert_rows(json.loads(path.read_text())["rows"])

    explained = program(tmp_path, "--explain")
    assert explained.returncode == 0, explained.stderr
    said = explained.stdout.splitlines()
    for op in OPS:
        assert any(line.startswith(f"{op} training eager: ") for line in said)
    assert any(line.startswith("    not torch: ") or ": torch, " in line for line in said)

    # Whatever the verdict is: two calls on a busy machine prove nothing.
    proved = program(tmp_path, "--prove", "2", "--seed", "1")
    assert proved.returncode in (0, 1), proved.stderr
    assert proved.stderr == ""
    assert " of 2 calls (" in proved.stdout
    assert proved.stdout.splitlines()[-1] == "--seed 1 draws the same calls again"


def assert_measured(said: str, files: list[Path], home: Path) -> None:
    """What was printed has every class with its winners, and the one file keeps them."""
    first, *lines = said.splitlines()
    count = int(first.removesuffix(" classes of calls"))
    classes = [line for line in lines if line.startswith(tuple(OPS))]
    assert len(classes) == count >= 4
    assert {line.split()[0] for line in classes} == OPS
    assert all(" training eager: " in line for line in classes)
    assert sum(line.startswith("  up to ") for line in lines) >= count
    assert "refused" not in said
    (path,) = files
    assert path.is_relative_to(home / ".cache" / "gptkernels" / "tuned")
    assert any(
        line.startswith(f"{count} classes measured in ") and line.endswith(f", kept in {path}")
        for line in lines
    )
    assert len(path.read_text().splitlines()) == 1 + count


def assert_rows(rows: list[dict[str, Any]]) -> None:
    """What --json wrote."""
    assert {Key.from_dict(row["class"]).op for row in rows} == OPS
    for row in rows:
        assert row["time_s"] > 0
        assert row["pytorch_s"] > 0
        assert row["others"]
        assert row["error"] <= row["limit"]


def test_generate(folder: Path, tmp_path: Path) -> None:
    """Little time: what is left is said, and what is kept is of calls without gradients."""
    how = ("--generate", "--batch", "1", "--tokens", "3", "--dtype", "fp32", "--seconds", "0.1")
    result = program(tmp_path, folder, *how)
    assert result.returncode == 0, result.stderr
    assert "No time was left for " in result.stdout
    assert " forward eager: " in result.stdout
    (path,) = kept(tmp_path)
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert {entry["key"]["direction"] for entry in entries} == {FORWARD}


# ---- what is refused, and what is measured, without measuring


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Those that would be measured."""
    from gptkernels import tuning

    seen: list[Key] = []

    def tune(recorded: Any, **how: Any) -> tuning.Report:
        seen.extend(recorded)
        return tuning.Report()

    monkeypatch.setattr(tuning, "tune", tune)
    return seen


def test_a_published_shape(call: Any, classes: list[Key]) -> None:
    how = ("--config", "gpt2", "--batch", "1", "--tokens", "2", "--device", "cpu")
    result = call("tune", *how)
    assert not result.err
    mlp = [dict(key.facts) for key in classes if key.op == "gelu_mlp"]
    assert [(facts["C"], facts["F"], facts["dtype"]) for facts in mlp] == [(768, 3072, "bfloat16")]
    assert mlp[0]["autocast"]
    assert {key.direction for key in classes} == {TRAINING}


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast(autocast: bool, folder: Path, call: Any, classes: list[Key]) -> None:
    flag = "--autocast" if autocast else "--no-autocast"
    result = call("tune", folder, "--dtype", "bf16", flag, "--batch", "1", "--device", "cpu")
    assert not result.err
    mlp = [dict(key.facts) for key in classes if key.op == "gelu_mlp"]
    assert [(facts["autocast"], facts["weights"]) for facts in mlp] == [
        (autocast, "float32" if autocast else "bfloat16")
    ]


BAD: dict[str, tuple[list[str], str]] = {
    "no model": ([], "name a FOLDER with a model, or --config"),
    "both": (["FOLDER", "--config", "gpt2"], "name a FOLDER with a model, or --config"),
    "unknown config": (["--config", "gpt9"], "gpt9"),
    "too many tokens": (["FOLDER", "--tokens", "17"], "tokens must be at most block_size=16"),
    "too many to generate": (["FOLDER", "--generate", "--tokens", "17"], "at most block_size=16"),
    "no tokens": (["FOLDER", "--tokens", "0"], "--tokens"),
    "no texts": (["FOLDER", "--batch", "0"], "--batch"),
    "no time": (["FOLDER", "--seconds", "0"], "--seconds"),
    "dtype": (["FOLDER", "--dtype", "float8"], "float8"),
    "device": (["FOLDER", "--device", "tpu"], "tpu"),
    "explain a model": (["FOLDER", "--explain"], "name no model"),
    "explain a config": (["--config", "gpt2", "--explain"], "name no model"),
    "prove a model": (["FOLDER", "--prove", "2"], "name no model"),
    "explain to a file": (["--explain", "--json", "rows.json"], "no --json"),
    "a seed for nothing": (["FOLDER", "--seed", "1"], "--seed is of --prove"),
    "prove nothing": (["--prove", "0"], "--prove"),
    "explain and prove": (["--explain", "--prove", "2"], "exclude each other"),
    "nothing to prove": (["--prove", "2"], "run gptkernels tune first"),
    "empty folder": (["EMPTY"], "config.json"),
    "no folder": (["EMPTY/nothing"], "nothing"),
    "autocast in fp32": (["FOLDER", "--dtype", "fp32", "--autocast"], "--autocast goes with"),
    "autocast to generate": (["FOLDER", "--generate", "--autocast"], "--autocast goes with"),
    "switched off": (["FOLDER", "--tokens", "2", "--batch", "1"], "GPTKERNELS_TUNE is 'off'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what: str, folder: Path, tmp_path: Path, call: Any) -> None:
    given, said = BAD[what]
    words = [w.replace("FOLDER", str(folder)).replace("EMPTY", str(tmp_path)) for w in given]
    if "--device" not in words:
        words += ["--device", "cpu"]
    assert_refused(call("tune", *words), said)


def test_nothing_to_explain(call: Any) -> None:
    result = call("tune", "--explain", "--device", "cpu")
    assert result.code == 0
    assert result.out == "nothing was measured on this machine yet: run gptkernels tune\n"


@pytest.mark.parametrize(("load", "said"), [(0.0, False), (1000.0, True)])
def test_a_busy_machine_is_named(load: float, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_table.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert bool(tune_table.busy()) == said
