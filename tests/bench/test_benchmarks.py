"""Timing and its records. No test here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT

import gptkernels
from benchmarks import gpu, twins
from gptkernels import bench
from gptkernels.bench import report, timing
from gptkernels.core.choice import unavailable
from gptkernels.truth import baseline, parity, reference, verify


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
        assert 0 < found.min_s <= found.low_s <= found.time_s <= found.high_s
    runs = [name for name, _ in itertools.groupby(calls)]
    assert runs == ["a", "b"] * (len(runs) // 2)


def test_compare_refuses() -> None:
    with pytest.raises(ValueError, match="candidates is empty"):
        timing.compare({})
    with pytest.raises(ValueError, match="min_rounds is 3 and max_rounds is 2"):
        timing.compare({"a": int}, min_rounds=3, max_rounds=2)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "pytorch": timing.Timing.of([1.5, 2.0, 2.1]),
        "torch": timing.Timing.of([0.4, 0.5, 0.7]),
    }
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
    assert (fused["dtype"], fused["min_s"], fused["rounds"]) == ("float16", 0.4, 3)
    assert (skipped["time_s"], skipped["skipped"]) == (None, "no reason")
    assert (fused["low_s"], fused["high_s"]) == (pytest.approx(0.45), pytest.approx(0.6))
    assert report.figures(fused)["vs pytorch"] == "4.00x"
    assert report.figures(fused)["spread"] == "15%"  # half the distance of the quartiles
    assert report.figures(skipped) == {"time": "skipped: no reason"}


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB\nand more")


def case_of(name: str, **candidates: Any) -> timing.Case:
    return timing.Case("attention", name, torch.float32, "forward", candidates)


def test_a_candidate_that_raises_is_skipped_and_the_others_are_timed() -> None:
    cases = [
        case_of("no baseline", pytorch=out_of_memory, torch=int),
        case_of("no candidate", pytorch=int, torch=out_of_memory),
        case_of("nothing", pytorch=out_of_memory),
        case_of("all", pytorch=int, torch=int),
    ]
    rows = list(timing.rows(cases, budget_s=0.0))
    found = {
        (row["shape"], row["impl"]): (row["time_s"] is not None, row.get("ratio") is not None)
        for row in rows
    }
    assert found == {
        ("no baseline", "torch"): (True, False),
        ("no baseline", "pytorch"): (False, False),
        ("no candidate", "pytorch"): (True, True),
        ("no candidate", "torch"): (False, False),
        ("nothing", "pytorch"): (False, False),
        ("all", "pytorch"): (True, True),
        ("all", "torch"): (True, True),
    }
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 34 GiB"
    assert {row["skipped"] for row in rows if "skipped" in row} == {reason}
    assert {"time": f"skipped: {reason}"} in [report.figures(row) for row in rows]


def test_the_demo_shows_what_has_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = pytest.importorskip("gptkernels.cli.demo.speed")
    from rich.console import Console

    cases = [case_of("S", pytorch=out_of_memory, torch=int)]
    trained = types.SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(speed, "_training_steps", lambda trained: cases[:1])
    monkeypatch.setattr(bench, "rows_of", lambda *a, **k: timing.rows(cases))
    monkeypatch.setattr(bench, "OPERATORS", ["attention"])
    console = Console(file=io.StringIO(), width=200)
    rows = speed.speed_table(trained, console)
    assert [row["impl"] for row in rows] == ["torch", "pytorch"] * 2
    shown = console.file.getvalue()
    assert "pytorch: OutOfMemoryError: CUDA out of memory. Tried to allocate 34 GiB" in shown
    (line, _) = (line.split() for line in shown.splitlines() if " torch " in line)
    assert line[-2:] == ["-", "-"]


def test_what_raises_in_a_comparison_alone_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        timing.compare({"a": out_of_memory})


def test_ceilings_belong_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to a kind of device: a machine's GPUs may differ."""
    asked: list[torch.device] = []

    def ceiling(device: torch.device, *_: torch.dtype) -> float:
        asked.append(device)
        return 1.0

    monkeypatch.setattr(timing, "copy_bandwidth", ceiling)
    monkeypatch.setattr(timing, "product_rate", ceiling)
    case = timing.Case("op", "shape", torch.float32, "forward", {"pytorch": int}, 1, 1)
    assert len(list(timing.rows([case], device="cpu:0", budget_s=0.0))) == 1
    assert asked == [torch.device("cpu:0")] * 2


def test_the_gpu_waits_while_the_host_queues_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is queued, with a stand-in for the GPU."""
    queued: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queued.append("record")

        def synchronize(self) -> None:
            queued.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    class Properties:
        L2_cache_size = 1 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", queued.append)
    sample = timing._cuda_sampler(torch.device("cpu"), {"a": 1e-4, "b": 0.0})
    assert sample("a", lambda: queued.append("call")) == 2e-3
    sleep, *rest = queued
    assert rest == ["record", "call", "record", "synchronize"]
    assert sleep / 2e9 > 1e-4  # seconds on a GPU of 2 GHz, against the host's
    sample("b", int)


def test_the_hosts_time_is_reported_apart() -> None:
    row = {"time_s": 1e-5, "host_s": 1e-4, "ratio": 2.0}
    assert report.figures(row) == {"time": "10 us", "host": "100 us", "vs pytorch": "2.00x"}
    (row,) = timing.rows([case_of("one", pytorch=int)], budget_s=0.0)
    assert row["host_s"] is None  # on a CPU it is the time itself


def test_plain_attention_is_timed_without_making_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(bench.cases_of("attention", "cpu", ()))
    make = baseline.band_mask

    def none_made(*args: Any, **options: Any) -> None:
        assert make(*args, **options) is None

    monkeypatch.setattr(baseline, "band_mask", none_made)
    for case in cases:
        case.candidates["pytorch"]()


def test_plain_attention_takes_a_fused_path_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal is a flag and no mask; with a mask the key heads are as many as the query heads."""
    seen: list[tuple[Any, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        masked = options["attn_mask"] is not None
        seen.append((masked, options["is_causal"], options["enable_gqa"], k.shape[1]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    q, k = (torch.randn(1, 6, heads, 8, dtype=torch.float64) for heads in (4, 2))
    lengths = torch.tensor([4])
    for options in ({}, {"causal": False}, {"window": (2, 0)}, {"key_lengths": lengths}):
        given: dict[str, Any] = {"q": q, "k": k, "v": k, **options}
        torch.testing.assert_close(baseline.attention(**given), reference.attention(**given))
        assert len(set(seen)) == 1
        case = seen.pop()
        expected = {(): (False, True, True, 2), ("causal",): (False, False, True, 2)}
        assert case == expected.get(tuple(options), (True, False, False, 4))
        seen.clear()


def test_plain_attention_sees_what_ours_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = []

    def note(*tensors: torch.Tensor, impl: str = "", **options: Any) -> torch.Tensor:
        calls.append((tensors, options))
        return tensors[0]

    plain = baseline.attention
    monkeypatch.setattr(baseline, "attention", note)
    monkeypatch.setattr(gptkernels, "attention", note)
    for case in bench.cases_of("attention", "cpu", ("torch",)):
        if (case.direction, case.dtype) == ("forward", torch.float32) and " T512 " in case.shape:
            case.candidates["pytorch"]()
            case.candidates["torch"]()
    assert [options.get("window") for _, options in calls] == [None, None, None, (64, 0)]
    for (_, theirs), (tensors, ours) in zip(calls[::2], calls[1::2], strict=True):
        parity.assert_parity(
            functools.partial(plain, **theirs),
            functools.partial(plain, **ours),
            functools.partial(reference.attention, **ours),
            dict(zip("qkv", tensors, strict=True)),
        )


@pytest.mark.parametrize("op", bench.OPERATORS)
def test_every_case_runs(op: str) -> None:
    cases = list(bench.cases_of(op, "cpu", ("triton", "torch"), quick=True))
    both = {"forward"} if op == "attention_decode" else {"forward", "forward+backward"}
    assert {case.direction for case in cases} >= both
    for case in cases:
        assert case.op == op
        assert case.bytes_moved > 0
        assert set(case.candidates) | set(case.skipped) == {"pytorch", "triton", "torch"}
        assert "triton" in case.skipped  # the interpreter's time says nothing
        results = {name: flat(call()) for name, call in case.candidates.items()}
        for mine, plain in zip(results["torch"], results["pytorch"], strict=True):
            assert mine.shape == plain.shape


def test_packed_sequences_stand_beside_the_same_attention() -> None:
    cases = list(bench.cases_of("attention_varlen", "cpu", ("torch",)))
    cases = [case for case in cases if case.dtype == torch.float32]
    rivals = [case.shape.split(", PyTorch ")[1] for case in cases[::2]]
    assert rivals == ["one by one", "padded"] * 2
    for case in cases:
        mine, plain = (flat(case.candidates[name]()) for name in ("torch", "pytorch"))
        torch.testing.assert_close(mine, plain)


def flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="op is 'softmax'; it must be one of layer_norm"):
        bench.cases_of("softmax", "cpu", ())


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


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it would choose a display
    row = {"op": "a", "shape": "b", "dtype": "c", "direction": "d", "impl": "e", "ratio": 1.2}
    report.plot([row, {**row, "ratio": None}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report.plot([row], tmp_path / "folder" / "plot.SVG")
    assert b"<svg" in (tmp_path / "folder" / "plot.SVG").read_bytes()
    with pytest.raises(ValueError, match="no measured ratio"):
        report.plot([], tmp_path / "plot.png")


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "png"])
def test_a_plot_that_cannot_be_written_is_refused_before_measuring(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("gptkernels.cli.main")
    with pytest.raises(ValueError, match=rf"\.png or \.svg, got '{name}'"):
        report.check_plot(name)
    monkeypatch.setattr(bench, "rows_of", None)
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        cli.commands.main(["bench", "--op", "layer_norm", "--plot", name], standalone_mode=False)


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib.*gptkernels\[bench\]"):
        report.check_plot("plot.png")


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

    def run(parts: list[gpu._Part], end: float, together: Path) -> bool:
        ran.append(together.name)
        return True

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu, "_sanitize", lambda end, path: run([], end, path))
    monkeypatch.setattr(gpu, "unavailable", lambda *asked: reason)
    (tmp_path / "twins.json").touch()  # of an earlier run
    assert gpu._all(tmp_path, 1.0) == 0
    checked = [] if reason else ["twins.json", "sanitizer.json"]
    speed = ["speed_quick.json", "speed_full.json"]
    assert ran == ["tests.json", "parity.json", *checked, *speed]
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
