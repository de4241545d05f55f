"""Timing and its records. No test here depends on how fast anything is."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

benchmarks = pytest.importorskip("gptkernels.benchmarks")
from gptkernels.benchmarks import gpu, report, timing  # noqa: E402


def test_candidates_alternate() -> None:
    calls: list[str] = []
    timings = timing.compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        budget_s=0.0,
        min_rounds=3,
        max_rounds=3,
    )
    assert list(timings) == ["a", "b"]
    for found in timings.values():
        assert found.rounds == 3
        assert 0 < found.min_s <= found.median_s
    runs = [name for name, _ in itertools.groupby(calls)]
    assert runs == ["a", "b"] * (len(runs) // 2)


def test_compare_refuses() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        timing.compare({})
    with pytest.raises(ValueError, match="min_rounds is 3 and max_rounds is 2"):
        timing.compare({"a": int}, min_rounds=3, max_rounds=2)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"pytorch": timing.Timing(2.0, 1.5, 7), "torch": timing.Timing(0.5, 0.4, 7)}
    monkeypatch.setattr(timing, "compare", lambda candidates, **options: times)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 100.0)
    monkeypatch.setattr(timing, "product_rate", lambda device, dtype: 1000.0)
    case = timing.Case(
        "layer_norm",
        "B1",
        torch.float16,
        "forward",
        dict.fromkeys(times, int),
        bytes_moved=20,
        flops=100,
        skipped={"triton": "no reason"},
    )
    plain, fused, skipped = timing.rows([case])
    assert (plain["ratio"], fused["ratio"]) == (1.0, 4.0)
    assert fused["floor_s"] == 0.2  # the memory's, which is larger than 0.1 of the arithmetic's
    assert fused["floor_share"] == 0.4
    assert (fused["bytes_per_s"], fused["flops_per_s"]) == (40.0, 200.0)
    assert (fused["dtype"], fused["min_s"], fused["rounds"]) == ("float16", 0.4, 7)
    assert (skipped["time_s"], skipped["skipped"]) == (None, "no reason")
    assert report.figures(fused)["vs pytorch"] == "4.00x"
    assert report.figures(skipped) == {"time": "skipped: no reason"}


@pytest.mark.parametrize("op", benchmarks.OPERATORS)
def test_every_case_runs(op: str) -> None:
    cases = list(benchmarks.suite(op).cases("cpu", ("triton", "torch"), quick=True))
    assert {case.direction for case in cases} >= {"forward", "forward+backward"}
    for case in cases:
        assert case.op == op
        assert case.bytes_moved > 0
        assert set(case.candidates) | set(case.skipped) == {"pytorch", "triton", "torch"}
        assert "triton" in case.skipped  # the interpreter's time says nothing
        results = {name: flat(call()) for name, call in case.candidates.items()}
        for mine, plain in zip(results["torch"], results["pytorch"], strict=True):
            assert mine.shape == plain.shape


def flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="op is 'softmax'; it must be one of layer_norm"):
        benchmarks.suite("softmax")


def test_a_run_cut_short_leaves_its_rows(tmp_path: Path) -> None:
    def rows() -> Iterator[report.Row]:
        yield {"n": 1}
        yield {"n": 2}
        raise KeyboardInterrupt

    path = tmp_path / "folder" / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        list(report.recorded(rows(), path))
    content = json.loads(path.read_text())
    assert (content["finished"], content["rows"]) == (False, [{"n": 1}, {"n": 2}])
    for key in ("time", "command", "commit", "versions", "gpu", "python", "gptkernels"):
        assert key in content["environment"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report.write_json(path, {"old": True})
    with pytest.raises(TypeError):
        report.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"op": "a", "shape": "b", "dtype": "c", "direction": "d", "impl": "e", "ratio": 1.2}
    report.plot([row, {**row, "ratio": None}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no measured ratio"):
        report.plot([], tmp_path / "plot.png")


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
    plugin = ["-p", "gptkernels.benchmarks.record", "-p", "no:cacheprovider", "-q"]
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


def test_a_part_is_stopped_when_its_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeping = ["timeit", "-n1", "-r1", "import time; time.sleep(100)"]
    part = gpu._Part("endless", sleeping, tmp_path / "none.json")
    assert not gpu._run([part], time.monotonic(), tmp_path / "joined.json")
    assert "=== endless: cut short" in capsys.readouterr().out
    assert not json.loads((tmp_path / "joined.json").read_text())["finished"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_run_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
