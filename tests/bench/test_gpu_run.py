"""`make gpu` without a GPU: its parts and their results."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT

from benchmarks import gpu, twins
from gptkernels.core.choice import unavailable
from gptkernels.truth import verify


def test_parts_side_by_side_record_their_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shares run every test once; a share that fails is said to."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='for a reason')\n"
        "def test_skipped(): pass\n"
    )
    plugin = ["-p", "benchmarks.record", "-p", "no:cacheprovider", "-q"]
    parts = []
    for share in (1, 2):
        path = tmp_path / f"{share}.json"
        chosen = [f"--record={path}", f"--share={share}/2", str(tmp_path / "test_it.py")]
        parts.append(gpu._Part(f"part {share}", ["pytest", *plugin, *chosen], path))
    assert not gpu._run(parts, time.monotonic() + 100, tmp_path / "joined.json")

    content = json.loads((tmp_path / "joined.json").read_text())
    assert content["finished"]
    good, skipped, bad = content["rows"]  # the first and third test, then the second
    assert (good["test"].split("::")[-1], good["outcome"]) == ("test_good", "passed")
    assert (skipped["outcome"], "for a reason" in skipped["reason"]) == ("skipped", True)
    assert (bad["outcome"], "assert 1 == 2" in bad["reason"]) == ("failed", True)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["joined.json"]
    shown = capsys.readouterr().out
    assert "=== part 1: passed" in shown
    assert "=== part 2: exit code 1" in shown


def test_shares_are_even_over_the_dtypes() -> None:
    tests = list(itertools.product(range(40), verify.DTYPES))
    for cpus in range(1, 65):
        shares = gpu._shares(cpus)
        assert 1 <= shares <= max(1, cpus // 2)
        slow = [sum(dtype == torch.float32 for _, dtype in tests[k::shares]) for k in range(shares)]
        assert max(slow) - min(slow) <= 1


def test_the_gpu_run_has_every_test_that_is_marked_so() -> None:
    """The other files need more packages than a machine with a GPU has to have."""
    marker = ".".join(("mark", "gpu"))
    fixture = r"\bmachine: Machine"  # of machines.py, which is marked
    files = (ROOT / "tests").rglob("test_*.py")
    marked = [path.name for path in files if re.search(rf"{marker}\b|{fixture}", path.read_text())]
    assert sorted(marked) == sorted(path.name for path in gpu._TESTS)


def test_a_part_is_stopped_when_its_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeping = ["timeit", "-n1", "-r1", "import time; time.sleep(100)"]
    part = gpu._Part("endless", sleeping, tmp_path / "none.json")
    assert not gpu._run([part], time.monotonic(), tmp_path / "joined.json")
    assert "=== endless: cut short" in capsys.readouterr().out
    assert gpu._run([part], time.monotonic(), tmp_path / "joined.json", cut_short_passes=True)
    part = gpu._Part("wrong", ["nothere"], tmp_path / "none.json")
    later = time.monotonic() + 100
    assert not gpu._run([part], later, tmp_path / "wrong.json", cut_short_passes=True)
    assert not json.loads((tmp_path / "joined.json").read_text())["finished"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
class TestTwins:
    """With the emulator on both sides."""

    @pytest.fixture(autouse=True)
    def emulator(self) -> None:
        reason = unavailable("cuda", "cpu", torch.float32)
        if reason is not None:
            pytest.skip(reason)

    def test_a_difference_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (case,) = (case for case in verify.CASES if case.name == "C 64, F 256")
        monkeypatch.setattr(verify, "CASES", (case,))
        monkeypatch.setattr(verify, "DTYPES", (torch.float16,))
        emulated = twins.results("gelu_mlp", "cpu", 7)
        rows = list(twins.rows("gelu_mlp", "cpu", 7, emulated))
        assert [row["tensor"] for row in rows] == ["y", "d x", "d w1", "d b1", "d w2", "d b2"]
        assert {(row["status"], row["difference"], row["equal"]) for row in rows} == {
            ("pass", 0.0, 1.0)
        }
        emulated[case.name, "float16"]["d w2"][3, 5] += 1
        failed = [row for row in twins.rows("gelu_mlp", "cpu", 7, emulated) if row["equal"] < 1]
        assert [(row["tensor"], row["status"]) for row in failed] == [("d w2", "fail")]

    def test_the_emulator_runs_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        path = tmp_path / "twins.json"
        assert twins.main(["--op=layer_norm", "--device=cpu", f"--results={path}"]) == 0
        content = json.loads(path.read_text())
        assert content["finished"]
        assert {row["status"] for row in content["rows"]} == {"pass"}


@pytest.mark.parametrize("reason", [None, "it was built without nvcc"])
def test_the_gpu_run_goes_on_without_cuda_kernels(
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = []

    def run(parts: list[gpu._Part], end: float, together: Path, **_: bool) -> bool:
        ran.append(together.name)
        return True

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu, "_sanitize", lambda end, path: run([], end, path))
    monkeypatch.setattr(gpu, "unavailable", lambda *asked: reason)
    for name in ("twins", "speed_quick"):  # of an earlier run
        (tmp_path / f"{name}.json").touch()
    assert gpu._all(tmp_path, 1.0) == 0
    checked = [] if reason else ["twins.json", "sanitizer.json"]
    speed = ["speed_quick.json", "speed_full.json"]
    assert ran == ["tests.json", "parity.json", "tuned.json", *checked, *speed]
    said = f"=== twins and compute-sanitizer: skipped, {reason}\n"
    assert (said in capsys.readouterr().out) == bool(reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_run_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
