"""`gptkernels bench`: what it prints and writes, how it ends. No test depends on how fast anything
is: times are made up, but for one run of the smallest shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")

from gptkernels import bench
from gptkernels.bench import run, timing
from gptkernels.bench.case import Case
from gptkernels.bench.cases import layer_norm
from gptkernels.cli import bench_table
from gptkernels.core.choice import automatic

# Seconds that each candidate is said to take.
SECONDS = {
    "pytorch": 2.0, "torch": 2.0, "cpu": 1.0, "torch.compile": 1.5,
    "torch.compile max-autotune": 1.9,
}  # fmt: skip
HEAD = {
    "ceilings": {"products": {"float32": 3.5e11}, "memory": [[65536, 5e10], [1 << 28, 2.5e10]]},
    "peers": [
        {"name": "SDPA", "package": "torch", "version": "2", "status": "here", "reason": None},
        {"name": "Liger", "package": "liger", "version": None, "status": "absent", "reason": "no"},
    ],
}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The made-up times, of a machine with made-up ceilings; two shapes of LayerNorm alone."""
    found = dict(SECONDS)

    def compare(calls: dict[str, Callable[[], Any]], **_: Any) -> dict[str, timing.Timing]:
        return {n: timing.Timing.of([0.99 * found[n], found[n], 1.01 * found[n]]) for n in calls}

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(run, "head", lambda device, dtypes: HEAD)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = [layer_norm.Shape(3, 8), layer_norm.Shape(5, 8, residual=False)]
    monkeypatch.setattr(layer_norm, "shapes", lambda device_type, level: shapes)
    return found


ONE = ("bench", "--op", "layer_norm", "--dtype", "float32", "--device", "cpu")


def test_it_prints_the_machine_the_rows_and_a_summary(call: Any, seconds: Any) -> None:
    result = call(*ONE)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    for words in (
        "products float32 350 GFLOP/s; memory 50 GB/s in 64 KiB, 25 GB/s in 256 MiB",
        "Peers: PyTorch's SDPA",
        "Not installed: Liger",
        "layer_norm 3 rows C8 +residual float32 forward",
        "layer_norm 5 rows C8 plain float32 forward+backward",
    ):
        assert any(words in line for line in lines), words
    at = lines.index("layer_norm 3 rows C8 +residual float32 forward")
    titles, first, *_ = lines[at + 1 :]
    assert titles.split()[:4] == ["time", "spread", "PyTorch", "best"]
    assert first.split()[:6] == ["cpu", "1", "s", "1%", "2.00x", "1.50x"]  # the fastest
    (line,) = (line for line in lines if line.startswith("  layer_norm float32 forward "))
    assert "2.00x (2-0-0)" in line
    assert "1.50x (2-0-0)" in line
    (line,) = (line for line in lines if line.startswith("  4 of triton"))
    assert "CUDA tensors" in line or "Triton's interpreter" in line


def test_what_is_slower_than_a_peer_is_named(call: Any, seconds: dict[str, float]) -> None:
    seconds["torch.compile"] = 0.5
    result = call(*ONE, "--impl", "cpu", "--peers", "compile")
    assert result.code == 0, result.err
    assert "Slower than a peer, beyond the spread, in 4 cases:" in result.out
    assert (
        "  0.50x torch.compile: layer_norm 3 rows C8 +residual float32 forward (cpu)" in result.out
    )


@pytest.mark.parametrize(("words", "peers"), [
    (("--peers", "none"), []),
    (("--peers", "compile"), ["torch.compile", "torch.compile max-autotune"]),
    ((), ["torch.compile"]),
    (("--full",), ["torch.compile", "torch.compile max-autotune"]),
])  # fmt: skip
def test_peers_are_chosen(
    words: tuple[str, ...], peers: list[str], call: Any, seconds: dict[str, float], tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    assert call(*ONE, "--shape", "3 rows", "--json", path, *words).code == 0
    content = json.loads(path.read_text())
    assert content["finished"]
    assert {**HEAD, **content} == content
    names = [r["impl"] for r in content["rows"] if r["kind"] == "peer" and r["time_s"]]
    assert names == peers * 2
    assert {row["shape"] for row in content["rows"]} == {"3 rows C8 +residual"}


def test_a_slowed_implementation_is_found(
    call: Any, seconds: dict[str, float], tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    assert call(*ONE, "--json", path).code == 0
    result = call(*ONE, "--compare", path)
    assert result.code == 0, result.out
    assert "Beside the older file: 8 rows in both, 0 slower" in result.out
    seconds["cpu"] = 1.2
    result = call(*ONE, "--compare", path)
    assert result.code == 1
    assert "Beside the older file: 8 rows in both, 4 slower" in result.out
    assert (
        "20% slower (known to 2%): layer_norm 3 rows C8 +residual float32 forward cpu" in result.out
    )


def test_an_older_file_of_another_machine_is_said(
    call: Any, seconds: dict[str, float], tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    assert call(*ONE, "--json", path).code == 0
    content = json.loads(path.read_text())
    content["environment"]["cpu_threads"] = 77
    path.write_text(json.dumps(content))
    assert "The older file is of another cpu threads: 77, here" in call(*ONE, "--compare", path).out


def test_a_run_goes_on(call: Any, seconds: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert call(*ONE, "--shape", "3 rows", "--json", path).code == 0
    before = json.loads(path.read_text())["rows"]
    result = call(*ONE, "--json", path, "--resume")
    assert f"{path} has {len(before)} rows, which are not measured again" in result.out
    assert "layer_norm 5 rows" in result.out
    after = json.loads(path.read_text())["rows"]
    assert after[: len(before)] == before
    assert len(after) == 2 * len(before)


def test_an_unfinished_run_is_not_overwritten(call: Any, seconds: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert call(*ONE, "--json", path).code == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "finished": False}))
    result = call(*ONE, "--json", path)
    assert result.code == 2
    assert "holds an unfinished run of" in result.err
    assert json.loads(path.read_text())["rows"] == content["rows"]


def test_nothing_in_common_is_no_success(call: Any, seconds: Any, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    assert call(*ONE, "--shape", "3 rows", "--json", path).code == 0
    result = call(*ONE, "--shape", "5 rows", "--compare", path)
    assert result.code == 2
    assert "have no row in common" in result.err


def test_minutes_that_are_over(call: Any, seconds: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = call(*ONE, "--minutes", "1e-9", "--json", path)
    assert f"1e-09 minutes are over; --json {path} --resume goes on" in result.out
    assert not json.loads(path.read_text())["finished"]


def test_an_error_of_ours_is_no_success(
    call: Any, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(shape: Any, dtype: Any, device: Any, impls: Any) -> Iterator[Case]:
        def make() -> Any:
            raise RuntimeError("illegal memory access")

        yield Case("layer_norm", str(shape), dtype, "forward", lambda: int, ours={"cpu": make})

    monkeypatch.setattr(layer_norm, "cases", broken)
    result = call(*ONE)
    assert result.code == 1
    assert "  cpu: FAILED: RuntimeError: illegal memory access" in result.out


def test_a_broken_peer_is_no_success(
    call: Any, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = {"name": "Liger", "package": "liger", "version": "1", "status": "broken"}
    peers = [{**liger, "reason": "ImportError: undefined symbol"}]
    monkeypatch.setattr(run, "head", lambda device, dtypes: {**HEAD, "peers": peers})
    result = call(*ONE)
    assert result.code == 1
    assert "BROKEN: Liger is installed, and does not import: ImportError: undefined" in result.out
    assert call(*ONE, "--peers", "compile").code == 0


def test_auto_is_what_it_takes_here(
    call: Any, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model has no row of the implementation that "auto" takes."""

    def model(shape: Any, dtype: Any, device: Any, impls: Any) -> Iterator[Case]:
        def plain() -> Any:
            return lambda: torch.zeros(())

        yield Case("layer_norm", str(shape), dtype, "forward", plain, ours={"auto": plain})

    monkeypatch.setattr(layer_norm, "cases", model)
    seconds["auto"] = 1.0
    here = automatic("cpu")
    assert call(*ONE, "--impl", here).code == 0
    (other,) = {"torch", "cpu"} - {here}
    result = call(*ONE, "--impl", other)
    assert result.code == 1
    assert f"{other} layer_norm float32 did not run" in result.out


def test_a_report(call: Any, seconds: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = call(*ONE, "--report", tmp_path / "report")
    assert result.code == 0, result.err
    assert f"Report: {tmp_path / 'report' / 'index.html'}" in result.out
    assert "3 rows C8 +residual" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--op", "softmax"), ["softmax", "layer_norm", "gpt_training"]),
        (("--impl", "cutlass"), ["cutlass", "torch"]),
        (("--device", "cuda:99"), ["cuda:99"]),
        (("--dtype", "int8"), ["int8", "bfloat16"]),
        (("--quick", "--full"), ["--quick and --full"]),
        (("--resume",), ["--resume", "--json"]),
        (("--shape", "T77777"), ["no shape of", "holds 'T77777'"]),
        (("--peers", "sdap"), ["no peer is called 'sdap'", "SDPA flash"]),
        (("--compare", "nothere.json"), ["gptkernels: nothere.json: No such file or directory\n"]),
        (("--minutes", "0"), ["0"]),
        (("--report", "{file}/below"), ["is a file"]),
        (("--compare", "{file}"), ["is no results file of gptkernels"]),
        (("--json", "{file}", "--resume"), ["is no results file of gptkernels"]),
    ],
)
def test_it_refuses(words: tuple[str, ...], said: list[str], call: Any, tmp_path: Path) -> None:
    """Before anything is measured or written."""
    file = tmp_path / "file"
    file.write_text("no JSON")
    if words[0] == "--report":
        pytest.importorskip("matplotlib")
    result = call("bench", *(word.format(file=file) for word in words))
    assert result.code == 2
    assert result.err.startswith("gptkernels: ")
    assert result.err.count("\n") == 1
    for word in said:
        assert word in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "no JSON"


def test_a_narrow_terminal_loses_columns_and_no_number() -> None:
    row = {"op": "attention", "shape": "B1", "dtype": "float32", "direction": "forward",
           "impl": "transformers, torch.compile", "time_s": 1.234e-3, "low_s": 1.2e-3,
           "high_s": 1.3e-3, "ratio": 1.5, "peer_ratio": 1.2, "flops_per_s": 3.4e12, "limit": 2.0,
           "efficiency": 0.5, "error": 1.0, "peak_bytes": 3e6, "host_s": 1e-5}  # fmt: skip
    wide = list(bench_table.case([row], None))
    assert wide[2].split()[-2:] == ["10", "us"]
    for width in (60, 80, 120):
        lines = list(bench_table.case([row], width))
        assert max(map(len, lines)) <= width
        assert wide[2].startswith(lines[2])
        assert "1.23 ms" in lines[2]
    assert lines[2].endswith("MiB")  # at 120 columns the time of the host alone is lost


def test_what_is_named_and_cannot_run_is_no_success(call: Any, seconds: Any) -> None:
    result = call(*ONE, "--impl", "cuda", "--impl", "cpu", "--peers", "none")
    assert result.code == 1
    assert "cuda layer_norm float32 did not run, though asked for by name: it runs on" in result.out
    assert "cpu layer_norm float32 did not run" not in result.out
    assert call(*ONE, "--impl", "cuda", "--peers", "none", "--allow-skip").code == 0
    # What was not reached in the time given is no failure.
    assert call(*ONE, "--impl", "cuda", "--minutes", "1e-9").code == 0


def test_the_smallest_real_run(call: Any, tmp_path: Path) -> None:
    """Every number is there, and no efficiency above 1."""
    path = tmp_path / "rows.json"
    words = ("--quick", "--op", "layer_norm", "--peers", "none", "--impl", "torch", "--json", path)
    result = call("bench", *words, "--device", "cpu")
    assert result.code == 0, result.err
    content = json.loads(path.read_text())
    assert content["ceilings"]["products"]["bfloat16"] > 0
    assert {peer["name"] for peer in content["peers"]} >= {"SDPA flash", "Liger", "quack"}
    for row in content["rows"]:
        assert row["time_s"] > 0
        assert row["error"] < row["limit"] or row["kind"] == "baseline"
        assert (row["efficiency"] is None) != (row["no_efficiency"] is None)
        assert row["efficiency"] is None or 0 < row["efficiency"] <= 1


def test_every_op_has_its_cases() -> None:
    for op in bench.OPERATORS + bench.MODELS:
        assert bench.steps([op], "cpu", "quick")
        assert bench.steps([op], "cuda", "full")
