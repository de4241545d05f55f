"""A run: it is cut short and goes on, and what became slower is found. Times are made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT

from gptkernels import bench
from gptkernels.bench import measure, regressions, run, timing
from gptkernels.bench.case import Case
from gptkernels.bench.results import Results, read

CPU = torch.device("cpu")


class Shapes:
    """A module of cases: three shapes, of which each has two directions."""

    made: list[str]

    def shapes(self, device_type: str, level: str) -> Sequence[str]:
        return ["S1", "S2", "S3"]

    def dtypes(self, device_type: str, level: str) -> Sequence[torch.dtype]:
        return [torch.float32]

    def cases(self, shape: str, *_: Any) -> Iterator[Case]:
        for direction in ("forward", "forward+backward"):
            yield Case(
                "layer_norm", shape, torch.float32, direction, self._maker("plain", shape),
                ours={"cpu": self._maker("cpu", shape)},
                peers={"fast one": self._maker("fast", shape), "other": self._maker("o", shape)},
            )  # fmt: skip

    def _maker(self, name: str, shape: str) -> Callable[[], Callable[[], None]]:
        def make() -> Callable[[], None]:
            self.made.append(f"{name} {shape}")
            return lambda: None

        return make


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made, in order."""
    module = Shapes()
    module.made = []
    monkeypatch.setattr(bench, "_module", lambda op: module)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: None)
    seconds = {"pytorch": 1.0, "cpu": 0.5}
    monkeypatch.setattr(
        timing,
        "compare",
        lambda calls, **_: {name: timing.Timing.of([seconds.get(name, 2.0)]) for name in calls},
    )
    return module.made


def go(results: Results, **more: Any) -> Iterator[Any]:
    steps = bench.steps(["layer_norm"], "cpu")
    given: dict[str, Any] = {"peers": lambda name: "fast" in name, **more}
    return run.run(steps, results, device=CPU, impls=["cpu"], **given)


def test_every_case_is_written_as_it_is_measured(tmp_path: Path, made: list[str]) -> None:
    path = tmp_path / "rows.json"
    counts = [len(read(path)["rows"]) for _, rows in go(Results(path)) if rows]
    assert counts == [3, 6, 9, 12, 15, 18]
    content = read(path)
    assert content["finished"]
    assert [row["impl"] for row in content["rows"][:3]] == ["pytorch", "cpu", "fast one"]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, made: list[str]) -> None:
    path = tmp_path / "rows.json"
    cut = go(Results(path))
    for _ in range(4):  # S1 whole, and one case of S2; a step ends with no rows
        next(cut)
    cut.close()
    first = read(path)
    assert (len(first["rows"]), first["finished"]) == (9, False)
    made.clear()
    list(go(Results(path, resume=True)))
    assert made == [f"{name} {shape}" for shape in ("S2", "S3", "S3")
                    for name in ("plain", "cpu", "fast")]  # fmt: skip
    content = read(path)
    assert (len(content["rows"]), content["finished"]) == (18, True)
    keys = [regressions.key(row) for row in content["rows"]]
    assert len(set(keys)) == 18


def test_a_run_with_more_peers_measures_again(tmp_path: Path, made: list[str]) -> None:
    path = tmp_path / "rows.json"
    list(go(Results(path), peers=lambda name: False))
    assert len(read(path)["rows"]) == 12
    list(go(Results(path, resume=True)))
    assert len(read(path)["rows"]) == 18
    made.clear()
    list(go(Results(path, resume=True), peers=lambda name: False))  # fewer are there
    assert made == []


def test_peers_are_wanted_by_their_names() -> None:
    everything = run.wanted_peers((), "default")
    assert everything("SDPA flash")
    assert not everything("torch.compile max-autotune")
    assert run.wanted_peers((), "full")("torch.compile max-autotune")
    some = run.wanted_peers(("sdpa", "Liger"), "quick")
    assert [some(name) for name in ("SDPA flash", "Liger", "quack")] == [True, True, False]
    assert not run.wanted_peers(("none",), "quick")("SDPA flash")
    static = run.wanted_peers(("static",), "quick")
    assert static("transformers, static cache, torch.compile")
    with pytest.raises(ValueError, match="no peer is called 'sdap'; there are SDPA cuDNN"):
        run.wanted_peers(("sdap",), "quick")


def test_nothing_is_begun_when_time_is_up(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 59.0, 61.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    results = Results()
    list(go(results, minutes=1.0))
    assert (len(results.rows), results.content["finished"]) == (6, False)


def test_a_killed_process_leaves_whole_cases(tmp_path: Path) -> None:
    """Killed in the middle, where a real run is measuring."""
    path = tmp_path / "rows.json"
    words = ["bench", "--quick", "--op", "layer_norm", "--impl", "torch", "--peers", "none"]
    command = [sys.executable, "-m", "gptkernels", *words, f"--json={path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 100
        while time.monotonic() < ends and not (path.exists() and read(path)["rows"]):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = read(path)
    assert before["rows"]
    again = [*command, "--resume"]
    done = subprocess.run(again, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"has {len(before['rows'])} rows, which are not measured again" in done.stdout
    after = read(path)
    assert after["finished"]
    assert after["rows"][: len(before["rows"])] == before["rows"]
    keys = [regressions.key(row) for row in after["rows"]]
    assert len(keys) == len(set(keys)) == 8  # two shapes, two directions, PyTorch and "torch"


# ---- beside an older file


def row(impl: str = "cpu", **of: Any) -> dict[str, Any]:
    return {
        "op": "attention", "shape": "S", "dtype": "float32", "direction": "forward", "impl": impl,
        "kind": "ours", "time_s": 1.0, "low_s": 0.99, "high_s": 1.01, "ratio": 2.0,
        "ratio_spread": 0.01, **of,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("new", "change"),
    [
        ({"ratio": 2.0 / 1.04}, None),  # within 5%
        ({"ratio": 2.0 / 1.06}, 1.06),
        ({"ratio": 2.0 / 1.06, "ratio_spread": 0.08}, None),  # not known so well
        ({"ratio": 4.0}, None),
        ({"ratio": 2.0, "time_s": 3.0}, None),  # so PyTorch took 3 times as long too: the machine
        ({"ratio": None, "time_s": 1.1, "low_s": 1.09, "high_s": 1.11}, 1.1),
        ({"time_s": None, "failed": True, "skipped": "wrong"}, float("inf")),
        ({"time_s": None, "failed": False, "skipped": "not built"}, float("inf")),
        ({"kind": "peer", "impl": "SDPA", "ratio": 0.1}, None),
        ({"shape": "other", "ratio": 0.1}, None),
    ],
)
def test_what_became_slower(new: dict[str, Any], change: float | None) -> None:
    changes = [found["change"] for found in regressions.found([row()], [row(**new)])]
    assert changes == ([] if change is None else [pytest.approx(change)])


def test_files_without_kinds_are_compared_by_name() -> None:
    old = row()
    for name in ("kind", "ratio_spread"):
        del old[name]
    assert len(list(regressions.found([old], [row(ratio=1.0)]))) == 1
    assert regressions.compared([old], [row(), row(impl="torch")]) == 1


def test_what_is_slow_once_alone_is_chance() -> None:
    slow, chance = row(ratio=1.0), row(impl="torch", ratio=1.0)
    old = [row(), row(impl="torch")]
    slower = list(regressions.found(old, [slow, chance]))
    assert len(slower) == 2
    again = [row(ratio=1.1), row(impl="torch", ratio=2.0)]
    assert regressions.confirmed(slower, old, again) == slower[:1]
    # What was not measured again, since another run put it into the file, stays.
    assert regressions.confirmed(slower, old, again[1:]) == slower[:1]


def test_only_the_cases_in_doubt_are_measured_again(made: list[str]) -> None:
    steps = bench.steps(["layer_norm"], "cpu")
    doubtful = row(op="layer_norm", shape="S2", direction="forward+backward")
    rows = run.again(steps, [doubtful], device=CPU, impls=["cpu"], peers=lambda name: False)
    assert made == ["plain S2", "cpu S2"]
    assert {(r["shape"], r["direction"]) for r in rows} == {("S2", "forward+backward")}


def test_a_file_of_an_earlier_release_can_be_compared() -> None:
    old = json.loads((ROOT / "benchmarks" / "results" / "cpu_avx2.json").read_text())["rows"]
    assert regressions.compared(old, old) > 100
    assert list(regressions.found(old, [r for r in old if r["time_s"] is not None])) == []
