"""The tuning run without a GPU: kernels in the emulator, times made up."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune, tune_cases, tune_rows
from gptkernels.bench import dry_run, predict, timing
from gptkernels.core import native

pytestmark = pytest.mark.skipif(
    not (native.EMULATED and native._EMULATOR.exists()),
    reason="runs kernels in the emulator, which is not built; `make emulator` builds it",
)

CPU = torch.device("cpu")
HERE = {"gpu": "none", "commit": "c", "build": "b"}
BF16 = torch.bfloat16
SMALL = {
    "attention": dry_run.attention(2, 130, 2, 64, BF16, kv_heads=1),
    "gelu_mlp": dry_run.gelu_mlp(70, 64, 72, BF16),
    "layer_norm": dry_run.layer_norm(9, 512, BF16, residual=True),
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm90")
    tune._predicted.cache_clear()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of each comparison, whose times are made up: the second takes twice as long."""
    found: list[list[str]] = []

    def compare(calls: dict[str, Callable[[], Any]], **_: Any) -> dict[str, timing.Timing]:
        found.append(list(calls))
        for call in calls.values():
            call()
        return {name: timing.Timing.of([2e-3 * (1 + i)]) for i, name in enumerate(calls)}

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # a minute otherwise
    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(timing, "product_rate", lambda device, dtype: 8e14)
    return found


def rows_in(folder: Path, about: dict[str, Any] = HERE) -> tune_rows.Rows:
    return tune_rows.Rows(folder / "tune.jsonl", about)


def small(op: str, monkeypatch: pytest.MonkeyPatch) -> dry_run.Problem:
    monkeypatch.setattr(predict, "PROBLEMS", (SMALL[op],))
    monkeypatch.setattr(
        tune, "_predicted", lambda: {(p.problem, p.direction, p.way): p.seconds for p in
                                     predict.predictions((SMALL[op],))}
    )  # fmt: skip
    return SMALL[op]


KEY = dict(op="o", problem="p", direction="d", way="w")


class TestRows:
    def test_are_found_again(self, tmp_path: Path) -> None:
        rows = rows_in(tmp_path)
        rows.add(**KEY, status="started")
        assert rows.get("o", "p", "d", "w") is None
        assert [row["way"] for row in rows.started()] == ["w"]
        rows.add(**KEY, status="timed", time_s=1.0)
        again = rows_in(tmp_path)
        found = again.get("o", "p", "d", "w")
        assert found is not None
        assert (found["time_s"], found["gpu"], found["commit"]) == (1.0, "none", "c")
        assert again.started() == []
        again.add(**KEY, status="unfinished")
        assert rows_in(tmp_path).get("o", "p", "d", "w") is None

    @pytest.mark.parametrize(
        ("changed", "counts"),
        [
            ({}, True),
            ({"build": "other"}, True),  # of the same commit
            ({"commit": "other"}, True),  # the same kernels
            ({"build": "other", "commit": "other"}, False),
            ({"gpu": "other"}, False),
        ],
    )
    def test_of_other_kernels_do_not_count(
        self, tmp_path: Path, changed: dict[str, str], counts: bool
    ) -> None:
        rows_in(tmp_path).add(**KEY, status="timed")
        assert bool(rows_in(tmp_path, HERE | changed).found) == counts

    @pytest.mark.parametrize("commit", [None, "c+changes"])
    def test_of_a_commit_with_changes_count_by_the_build_alone(
        self, tmp_path: Path, commit: str | None
    ) -> None:
        about = HERE | {"commit": commit}
        rows_in(tmp_path, about).add(**KEY, status="timed")
        assert rows_in(tmp_path, about).found
        assert not rows_in(tmp_path, about | {"build": "other"}).found

    def test_a_line_that_was_cut_short_costs_no_other(self, tmp_path: Path) -> None:
        rows_in(tmp_path).add(**KEY, status="timed")
        path = tmp_path / "tune.jsonl"
        path.write_text(path.read_text() + '{"op": "o", "prob')
        rows = rows_in(tmp_path)
        assert len(rows.found) == 1
        rows.add(**(KEY | {"way": "other"}), status="timed")
        assert len(rows_in(tmp_path).found) == 2


@pytest.mark.parametrize("op", SMALL)
def test_cases_are_those_that_are_predicted(op: str) -> None:
    """So that a prediction is found for what was measured."""
    predicted = {(p.direction, p.way): p for p in predict.predictions((SMALL[op],))}
    found = {
        (case.direction, way.name): (case, way)
        for case in tune_cases.cases(SMALL[op], CPU, dry_run.machine_here("sm90"))
        for way in case.ways
        if case.direction != "forward + backward"
    }
    assert found.keys() == predicted.keys()
    for key, (case, way) in found.items():
        assert case.flops == predicted[key].flops
        assert case.bytes == predicted[key].bytes
        assert (way.build, way.chosen) == (predicted[key].build, predicted[key].chosen)


@pytest.mark.parametrize("op", SMALL)
def test_every_way_is_right_and_timed_beside_the_best_peer(
    op: str, tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small(op, monkeypatch)
    rows = rows_in(tmp_path)
    assert tune.run_part(op, "first", rows, CPU, time.time() + 600) == 0
    ours = [row for row in rows.found.values() if row["kind"] == "ours"]
    for row in ours:
        assert row["status"] == "timed", row
        assert row["error"] <= row["limit"]
        assert (row["time_s"], row["peer_s"], row["ratio"]) == (2e-3, 4e-3, 2.0)
        assert row["rate"] == (row["flops"] or row["bytes"]) / 2e-3
        assert row["share"] == row["rate"] / (8e14 if row["flops"] else 4e12)
        assert (row["predicted_s"] is None) == (row["direction"] == "forward + backward")
        assert row["problem"] == problem.text
        # A comparison of two, with the peer that was fastest.
        assert [row["way"], row["peer"]] in compared
    skipped = [row for row in rows.found.values() if row["status"] == "skipped"]
    assert all(row["kind"] == "peer" and row["reason"] for row in skipped)
    if op == "attention":
        # Which needs a GPU, and is not installed.
        assert {"SDPA cuDNN", "FlashAttention-4"} <= {row["way"] for row in skipped}
    # Again: all is there.
    compared.clear()
    assert tune.run_part(op, "first", rows_in(tmp_path), CPU, time.time() + 600) == 0
    assert compared == []
    lines = list(tune_rows.table(rows_in(tmp_path)))
    assert len(lines) == 2 + len({row["direction"] for row in ours})
    assert all("2.00x" in line for line in lines[2:])


def test_a_wrong_kernel_is_not_timed(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small("layer_norm", monkeypatch)
    right = tune_cases.layer_norm_kernels.layer_norm_fwd

    def wrong(*arguments: Any, **options: Any) -> Any:
        y, *others = right(*arguments, **options)
        y[3, 17] += 0.5
        return y, *others

    monkeypatch.setattr(tune_cases.layer_norm_kernels, "layer_norm_fwd", wrong)
    rows = rows_in(tmp_path)
    tune.run_part("layer_norm", "first", rows, CPU, time.time() + 600)
    ours = [row for row in rows.found.values() if row["kind"] == "ours"]
    forward = [row for row in ours if row["direction"] == "forward"]
    assert forward
    for row in forward:
        assert row["status"] == "wrong"
        assert row["error"] > row["limit"]
        assert "time_s" not in row
    # The backward passes alone, beside their peer.
    assert sum(len(names) == 2 for names in compared) == len(ours) - len(forward)
    (line,) = (line for line in tune_rows.table(rows) if " forward |" in line)
    assert "none: wrong" in line


@pytest.mark.parametrize(
    ("kind", "status"), [(RuntimeError, "failed"), (torch.OutOfMemoryError, "skipped")]
)
def test_what_raises_leaves_a_row_and_the_others(
    kind: type[Exception],
    status: str,
    tmp_path: Path,
    compared: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small("layer_norm", monkeypatch)

    right = tune_cases.layer_norm_kernels.layer_norm_bwd

    def broken(*arguments: Any, **options: Any) -> Any:
        if arguments[0].is_meta:  # of a dry run, which launches nothing
            return right(*arguments, **options)
        raise kind("layer_norm_bwd on x (9, 512) failed to launch\nmore")

    monkeypatch.setattr(tune_cases.layer_norm_kernels, "layer_norm_bwd", broken)
    rows = rows_in(tmp_path)
    assert tune.run_part("layer_norm", "first", rows, CPU, time.time() + 600) == 0
    found = {row["direction"]: row for row in rows.found.values() if row["kind"] == "ours"}
    assert found["forward"]["status"] == "timed"
    assert found["backward"]["status"] == status
    assert found["backward"]["reason"] == (
        f"{kind.__name__}: layer_norm_bwd on x (9, 512) failed to launch"
    )


def test_a_poisoned_process_ends(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small("layer_norm", monkeypatch)
    monkeypatch.setattr(tune, "_usable", lambda device: False)
    rows = rows_in(tmp_path)
    code = tune.run_part("layer_norm", "first", rows, CPU, time.time() + 600)
    assert code == tune._POISONED
    assert len([row for row in rows.found.values() if row["kind"] != "ceiling"]) == 1


def test_time_is_up(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small("layer_norm", monkeypatch)
    rows = rows_in(tmp_path)
    assert tune.run_part("layer_norm", "first", rows, CPU, time.time() - 1) == tune._OUT_OF_TIME
    assert (rows.found, compared) == ({}, [])


def test_inputs_that_do_not_fit_leave_the_other_problems(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small("layer_norm", monkeypatch)
    large = dry_run.layer_norm(10, 512, BF16)
    monkeypatch.setattr(predict, "PROBLEMS", (SMALL["layer_norm"], large, SMALL["layer_norm"]))
    real = tune_cases.cases

    def cases(problem: dry_run.Problem, *arguments: Any) -> Any:
        if problem is large:
            raise torch.OutOfMemoryError("no memory is left")
        return real(problem, *arguments)

    monkeypatch.setattr(tune_cases, "cases", cases)
    rows = rows_in(tmp_path)
    assert tune.run_part("layer_norm", "rest", rows, CPU, time.time() + 600) == 0
    assert {row["status"] for row in rows.found.values() if row.get("problem") == large.text} == {
        "skipped"
    }
    assert any(row["status"] == "timed" for row in rows.found.values() if row["kind"] == "ours")
    (line,) = (line for line in tune_rows.table(rows) if large.text in line)
    assert line == f"| layer_norm {large.text} | none: skipped | | | | | |"


class TestProcesses:
    """What the parent makes of processes that end in any way; each is a few lines of Python."""

    def command(self, script: str, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        prelude = f"""
            import json, os, sys, time
            def add(way, status):
                row = dict({HERE!r}, op="attention", problem="p", direction="d", way=way)
                with open({str(path)!r}, "a") as file:
                    file.write(json.dumps(row | dict(kind="ours", status=status)) + "\\n")
            text = open({str(path)!r}).read() if os.path.exists({str(path)!r}) else ""
        """
        whole = textwrap.dedent(prelude) + textwrap.dedent(script)
        monkeypatch.setattr(tune, "_command", lambda *_: [sys.executable, "-S", "-c", whole])

    def run(self, tmp_path: Path, seconds: float = 60.0) -> tuple[bool, dict[str, str]]:
        path = tmp_path / "tune.jsonl"
        done = tune._run_part_apart(
            "attention", "first", tmp_path, path, time.time() + seconds, HERE
        )
        return done, {row["way"]: row["status"] for row in rows_in(tmp_path).found.values()}

    def test_a_crash_loses_one_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = """
            add("before", "failed")
            if "crashed" not in text:
                add("bad", "started")
                os.abort()
            add("after", "failed")
        """
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        done, statuses = self.run(tmp_path)
        assert done
        assert statuses == {"before": "failed", "bad": "crashed", "after": "failed"}
        row = rows_in(tmp_path).get("attention", "p", "d", "bad")
        assert row is not None
        assert row["reason"] == "its process ended with -6"

    def test_a_hang_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = """
            if "crashed" not in text:
                add("bad", "started")
                time.sleep(60)
            add("after", "failed")
        """
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        monkeypatch.setattr(tune, "_STUCK_S", 0.7)
        done, statuses = self.run(tmp_path)
        assert done
        assert statuses == {"bad": "crashed", "after": "failed"}

    def test_time_is_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.command('add("slow", "started"); time.sleep(60)', monkeypatch, tmp_path / "tune.jsonl")
        monkeypatch.setattr(tune, "_GRACE_S", 0.0)
        done, statuses = self.run(tmp_path, seconds=0.7)
        assert not done
        assert statuses == {"slow": "unfinished"}

    def test_a_process_that_cannot_begin_is_not_started_for_ever(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.command("sys.exit(2)", monkeypatch, tmp_path / "tune.jsonl")
        assert self.run(tmp_path) == (False, {})
        assert "its process ended with 2" in capsys.readouterr().err

    def test_a_poisoned_process_is_started_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = f"""
            if "bad" not in text:
                add("bad", "failed")
                sys.exit({tune._POISONED})
            add("after", "failed")
        """
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        done, statuses = self.run(tmp_path)
        assert done
        assert statuses == {"bad": "failed", "after": "failed"}

    def test_what_a_stopped_run_began_is_done_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not taken for a crash of the first process of the next run."""
        rows_in(tmp_path).add(**KEY, kind="ours", status="started")
        self.command("", monkeypatch, tmp_path / "tune.jsonl")
        assert tune.run(tmp_path, time.time() + 60, HERE) == 0
        assert rows_in(tmp_path).found[tuple(KEY.values())]["status"] == "unfinished"
        assert rows_in(tmp_path).get(*KEY.values()) is None

    def test_the_whole_ends_in_a_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.command('add("bad", "wrong")', monkeypatch, tmp_path / "tune.jsonl")
        assert tune.run(tmp_path, time.time() + 60, HERE) == 1
        assert "| attention p d | none: wrong |" in capsys.readouterr().out
        content = json.loads((tmp_path / "tune.json").read_text())
        assert content["finished"]
        assert content["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
        assert [row["status"] for row in content["rows"]] == ["wrong"]


def test_the_best_peer_is_the_fastest_that_ran(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    assert tune_rows.best_peer("o", "p", "d", rows) is None
    for way, kind, status, time_s in (
        ("slow", "peer", "timed", 2.0),
        ("fast", "peer", "timed", 1.0),
        ("ours", "ours", "timed", 0.5),
        ("absent", "peer", "skipped", 0.1),
    ):
        rows.add(**(KEY | {"way": way}), kind=kind, status=status, time_s=time_s)
    rows.add(
        **(KEY | {"way": "elsewhere", "problem": "q"}), kind="peer", status="timed", time_s=0.1
    )
    assert tune_rows.best_peer("o", "p", "d", rows) == "fast"


def test_parts_cover_every_problem() -> None:
    parts = [problem for op, which in tune.PARTS for problem in tune._problems(op, which)]
    assert sorted(map(id, parts)) == sorted(map(id, predict.PROBLEMS))
    assert parts[0].sizes["D"] == 128
    assert parts[0].sizes["T"] == 8192


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
