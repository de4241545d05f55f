"""`pytest benchmarks`: samples are taken in turns, and handed to pytest-benchmark as they are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from harness import ROOT, command

pytest.importorskip("pytest_benchmark")


def test_candidates_take_turns_and_runs_are_compared(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    suite = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    suite += ["-p", "no:cacheprovider", f"--benchmark-storage={saved}"]
    suite += ["-k", "layer_norm and plain and not backward"]
    # In a worker of xdist pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["OMP_NUM_THREADS"] = "1"  # other tests run beside it
    done = command(*suite, "--benchmark-save=one", "--benchmark-save-data", cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout
    (path,) = saved.rglob("*_one.json")
    found = json.loads(path.read_text())["benchmarks"]
    groups = {benchmark["group"] for benchmark in found}
    assert len(groups) == 1
    assert len(found) >= 2  # PyTorch, and ours
    # All candidates have as many samples, none of them a call of the clock alone.
    assert len({benchmark["stats"]["rounds"] for benchmark in found}) == 1
    assert all(min(benchmark["stats"]["data"]) > 1e-7 for benchmark in found)
    again = command(*suite, "--benchmark-compare", cwd=ROOT, env=env)
    assert again.returncode == 0, again.stdout
    assert "Comparing against benchmarks from:" in again.stdout + again.stderr
