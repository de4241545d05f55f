"""The tuning run without a GPU: CUDA C++ kernels in the emulator, Triton's in its interpreter,
times made up."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command, of

from benchmarks import tune, tune_ahead, tune_cases, tune_rows
from gptkernels.bench import dry_run, predict, timing
from gptkernels.bench.peers import packages
from gptkernels.core import ceilings, native
from gptkernels.ops.layer_norm import cuda as layer_norm_kernels
from gptkernels.tuning import tiles as triton_tiles

pytestmark = pytest.mark.skipif(
    not (native.EMULATED and native._EMULATOR.exists()),
    reason="runs kernels in the emulator, which is not built; `make emulator` builds it",
)

CPU = torch.device("cpu")
HERE = {"gpu": "none", "commit": "c", "about": {"cuda": "b", "triton": "t", "others": "o"}}
BF16, FP16 = torch.bfloat16, torch.float16
SMALL = {
    "attention": dry_run.attention(2, 130, 2, 64, BF16, kv_heads=1),
    "gelu_mlp": dry_run.gelu_mlp(70, 64, 72, BF16),
    "layer_norm": dry_run.layer_norm(9, 512, BF16, residual=True),
}
# Triton's interpreter does not compute in bf16, so the others have CUDA C++ kernels alone.
SMALL_FP16 = {
    "attention": dry_run.attention(1, 40, 2, 64, FP16, kv_heads=1),
    "gelu_mlp": dry_run.gelu_mlp(70, 64, 80, FP16),
    "layer_norm": dry_run.layer_norm(9, 512, FP16, residual=True),
    "layer_norm of wide rows": dry_run.layer_norm(3, 300, FP16),
}
(needs_triton,) = of("triton", dtype=FP16).marks


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
    monkeypatch.setattr(ceilings, "memory_rate", lambda device, working_set: 4e12)
    monkeypatch.setattr(ceilings, "product_rate", lambda device, dtype: 8e14)
    return found


def rows_in(folder: Path, about: dict[str, Any] = HERE) -> tune_rows.Rows:
    return tune_rows.Rows(folder / "tune.jsonl", about)


def small(
    op: str, monkeypatch: pytest.MonkeyPatch, problems: dict[str, dry_run.Problem] = SMALL
) -> dry_run.Problem:
    monkeypatch.setattr(predict, "PROBLEMS", (problems[op],))
    monkeypatch.setattr(
        tune, "_predicted", lambda: {(p.problem, p.direction, p.way): p.seconds for p in
                                     predict.predictions((problems[op],))}
    )  # fmt: skip
    return problems[op]


def ran(rows: tune_rows.Rows, impl: str) -> list[dict[str, Any]]:
    """Our rows of an implementation."""
    return [row for row in rows.found.values() if row.get("impl") == impl]


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda device_type: "there is no extension")


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
        for status in ("unfinished", "out of memory"):
            again.add(**KEY, status=status)
            assert rows_in(tmp_path).get("o", "p", "d", "w") is None

    @pytest.mark.parametrize(
        ("changed", "counting"),
        [
            ({}, {"cuda", "triton", ""}),
            ({"commit": "other"}, {"cuda", "triton", ""}),  # the same kernels
            ({"cuda": "other"}, {"cuda", "triton", ""}),  # of the same commit
            ({"cuda": "other", "commit": "other"}, {"triton", ""}),
            ({"cuda": None, "commit": "other"}, {"triton", ""}),
            ({"triton": "other"}, {"cuda", ""}),
            ({"others": "other"}, {"cuda", "triton"}),
            ({"gpu": "other"}, set()),
        ],
    )
    def test_of_other_kernels_do_not_count(
        self, tmp_path: Path, changed: dict[str, Any], counting: set[str]
    ) -> None:
        rows = rows_in(tmp_path)
        rows.add(**KEY, status="timed")
        for impl in ("cuda", "triton"):
            rows.add(**(KEY | {"way": impl}), impl=impl, status="timed")
        about = HERE["about"] | {name: changed[name] for name in changed.keys() & HERE["about"]}
        here = HERE | {name: changed[name] for name in changed.keys() & HERE} | {"about": about}
        assert {row.get("impl", "") for row in rows_in(tmp_path, here).found.values()} == counting

    @pytest.mark.parametrize("commit", [None, "c+changes"])
    def test_of_a_commit_with_changes_count_by_the_build_alone(
        self, tmp_path: Path, commit: str | None
    ) -> None:
        here = HERE | {"commit": commit}
        rows_in(tmp_path, here).add(**KEY, impl="cuda", status="timed")
        assert rows_in(tmp_path, here).found
        other = here | {"about": HERE["about"] | {"cuda": "other"}}
        assert not rows_in(tmp_path, other).found

    @needs_triton
    def test_are_about_what_is_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton

        about = tune_rows.here(CPU)["about"]
        assert about["cuda"].startswith("extension ")
        assert about["triton"].startswith(f"Triton {triton.__version__}, kernels ")
        assert f"torch {torch.__version__} here" in about["others"].split(", ")
        monkeypatch.setattr(triton, "__version__", "another")
        monkeypatch.setattr(native, "unavailable", lambda device_type: "there is no extension")
        without = tune_rows.here(CPU)["about"]
        assert without["cuda"] is None
        assert without["triton"].startswith("Triton another, ")
        assert without["triton"].split()[-1] == about["triton"].split()[-1]

    def test_of_peers_are_about_their_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peers = [
            {"package": "torch", "version": "2", "status": "here"},
            {"package": "torch", "version": "2", "status": "here"},
            {"package": "flash", "version": "3", "status": "broken"},
            {"package": "quack", "version": None, "status": "absent"},
        ]
        monkeypatch.setattr(packages, "found", lambda: peers)
        assert tune_rows.here(CPU)["about"]["others"] == "flash 3 broken, torch 2 here"

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
        for case in tune_cases.cases(SMALL[op], tune_cases.Place.here(CPU))
        for way in case.ways
        if case.direction != "forward + backward"
    }
    assert found.keys() == predicted.keys()
    for key, (case, way) in found.items():
        assert case.flops == predicted[key].flops
        assert case.bytes == predicted[key].bytes
        assert way.impl == "cuda"
        assert (way.made["build"], way.chosen) == (predicted[key].build, predicted[key].chosen)


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


@needs_triton
@pytest.mark.parametrize("op", SMALL_FP16)
def test_every_tile_of_triton_is_right_and_timed(
    op: str, tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptkernels.ops.layer_norm.triton import launch

    if op == "layer_norm of wide rows":  # a row that is too wide would take long
        monkeypatch.setattr(launch, "_WIDEST_IN_REGISTERS", 256)
        monkeypatch.setattr(launch, "_WIDE_CHUNK", 128)
    problem = small(op, monkeypatch, SMALL_FP16)
    rows = rows_in(tmp_path)
    assert tune.run_part(problem.op, "chosen", rows, CPU, time.time() + 600) == 0
    directions = {row["direction"] for row in ran(rows, "triton")}
    # One choice each; the MLP's plain products are cuBLAS's, which runs them as they are.
    assert len(ran(rows, "triton")) == len(directions) == 2 + (op == "gelu_mlp")
    assert all(row["chosen"] for row in ran(rows, "triton") + ran(rows, "cuda"))
    chosen = list(compared)
    assert tune.run_part(problem.op, "first", rows, CPU, time.time() + 600) == 0
    assert compared[: len(chosen)] == chosen
    for row in ran(rows, "triton"):
        assert row["status"] == "timed", row
        assert row["error"] <= row["limit"]
        assert (row["time_s"], row["ratio"], row["predicted_s"]) == (2e-3, 2.0, None)
        assert row["about"] == "t"
    for direction in directions - {"forward + backward"}:
        tiles = [row["tiles"] for row in ran(rows, "triton") if row["direction"] == direction]
        assert len(tiles) > 4
        assert all(tile not in tiles[:i] for i, tile in enumerate(tiles))
    lines = list(tune_rows.table(rows_in(tmp_path)))
    for impl in ("cuda", "triton"):
        assert sum(f" | {impl} | " in line for line in lines) == len(
            {row["direction"] for row in ran(rows, impl)}
        )


@needs_triton
class TestTiles:
    def test_the_chosen_one_is_that_of_the_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kernels are launched with the same constants and options, whether it is named or not."""
        from triton.runtime.interpreter import InterpretedFunction

        launches: list[Any] = []
        plain = (bool, int, float, str)

        def note(self: Any, *given: Any, grid: Any, **options: Any) -> None:
            launches.append((self, grid, [x for x in given if isinstance(x, plain)], options))

        monkeypatch.setattr(InterpretedFunction, "run", note)
        for problem in SMALL_FP16.values():
            for case in tune_cases.cases(problem, tune_cases.Place.here(CPU)):
                for way in (
                    way for way in case.ways if way.impl == "triton" and "tiles" in way.made
                ):
                    launches.clear()
                    way.call()
                    named = list(launches)
                    launches.clear()
                    way.call.func(*way.call.args)
                    assert named
                    assert (named == launches) == way.chosen

    def test_names(self) -> None:
        choices = {"queries_tile": [(128, 64, 8, 2), (64, 64, 4, 2)], "keys_tile": [(32, 64, 8, 2)]}
        assert dict(triton_tiles.ways(choices)) == {
            "triton queries 128x64, 8 warps, 2 stages; keys 32x64, 8 warps, 2 stages": {
                "queries_tile": (128, 64, 8, 2),
                "keys_tile": (32, 64, 8, 2),
            },
            "triton queries 64x64, 4 warps, 2 stages": {
                "queries_tile": (64, 64, 4, 2),
                "keys_tile": (32, 64, 8, 2),
            },
        }
        assert next(triton_tiles.ways({"tile": [(1, 512, 2, 3)]}))[0] == (
            "triton 1x512, 2 warps, 3 stages"
        )

    def test_neighbours(self) -> None:
        bounds = (16, 16, 4, 2), (128, 128, 8, 4)
        assert list(triton_tiles._neighbours((128, 32, 8, 2), *bounds)) == [
            (64, 32, 8, 2),
            (128, 16, 8, 2),
            (128, 64, 8, 2),
            (128, 32, 4, 2),
            (64, 32, 4, 2),
            (128, 32, 8, 3),
        ]

    @pytest.mark.parametrize("op", SMALL_FP16)
    def test_on_meta_are_those_of_the_gpu(self, op: str) -> None:
        here, apart = (
            [
                (case.direction, way.name)
                for case in tune_cases.cases(SMALL_FP16[op], place)
                for way in case.ways
                if "tiles" in way.made
            ]
            for place in (
                tune_cases.Place.here(CPU),
                tune_cases.Place(torch.device("meta"), None, CPU),
            )
        )
        assert here == apart


@needs_triton
def test_each_bad_tile_costs_its_own_row(
    tmp_path: Path,
    compared: list[list[str]],
    no_extension: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import OutOfResources

    from gptkernels.ops.layer_norm import triton as kernels

    too_large = OutOfResources(300_000, 232_448, "shared memory")
    does_not_fit = (
        "does not fit: OutOfResources: out of resource: shared memory, Required: 300000, "
        "Hardware limit: 232448. Reducing block sizes or `num_stages` may help."
    )
    raised = {
        (8, 512, 16, 3): too_large,
        (4, 512, 4, 3): RuntimeError("PassManager::run failed"),
        (16, 512, 16, 3): RuntimeError("an illegal memory access"),
        (8, 512, 8, 3): too_large,  # the launcher's choice has to fit
    }
    expected = {
        (8, 512, 8, 3): ("failed", does_not_fit.removeprefix("does not fit: ")),
        (4, 512, 8, 3): ("timed", None),
        (16, 512, 8, 3): ("timed", None),
        (8, 512, 4, 3): ("wrong", None),
        (8, 512, 16, 3): ("skipped", does_not_fit),
        (4, 512, 4, 3): ("skipped", "does not fit: RuntimeError: PassManager::run failed"),
        (16, 512, 16, 3): ("failed", "RuntimeError: an illegal memory access"),
    }
    small("layer_norm", monkeypatch, SMALL_FP16)
    right = kernels.layer_norm_fwd

    def spoiled(*arguments: Any, tile: Any) -> Any:
        if tile in raised:
            raise raised[tile]
        outputs = right(*arguments, tile=tile)
        if tile == (8, 512, 4, 3):
            outputs[0][3, 17] += 0.5
        return outputs

    monkeypatch.setattr(kernels, "layer_norm_fwd", spoiled)
    rows = rows_in(tmp_path)
    assert tune.run_part("layer_norm", "first", rows, CPU, time.time() + 600) == 0
    found = {
        tuple(row["tiles"]["tile"]): row
        for row in ran(rows, "triton")
        if row["direction"] == "forward"
    }
    assert {tile: (row["status"], row.get("reason")) for tile, row in found.items()} == expected
    wrong = found[8, 512, 4, 3]
    assert wrong["error"] > wrong["limit"]
    assert "time_s" not in wrong


@needs_triton
@pytest.mark.parametrize("op", ["attention", "gelu_mlp", "layer_norm"])
def test_without_the_extension_tiles_and_peers_are_timed(
    op: str,
    tmp_path: Path,
    compared: list[list[str]],
    no_extension: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> Any:
        raise AssertionError("there is nothing to predict with")

    small(op, monkeypatch, SMALL_FP16)
    monkeypatch.setattr(native, "dry_run", lambda *_, **__: none())
    monkeypatch.setattr(tune, "_predicted", none)
    rows = rows_in(tmp_path, HERE | {"about": HERE["about"] | {"cuda": None}})
    assert tune.run_part(op, "chosen", rows, CPU, time.time() + 600) == 0
    assert not ran(rows, "cuda")
    assert {row["status"] for row in ran(rows, "triton")} == {"timed"}
    timed = [row for row in rows.found.values() if row["kind"] == "peer" and "time_s" in row]
    # Products that are cuBLAS's in any case have no rows.
    assert {row["direction"] for row in timed} == {row["direction"] for row in ran(rows, "triton")}
    assert all(" | triton | " in line for line in list(tune_rows.table(rows))[2:])


def test_a_peer_is_made_once_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def maker() -> Callable[..., Any]:
        made.append("peer")
        return torch.mul

    found = {"peer": maker, "other": maker}
    for cotangents in (None, [torch.ones(3)]):
        made.clear()
        calls = tune_cases._calls(("peer",), found, [torch.ones(3), torch.ones(3)], cotangents)
        assert calls["peer"]() is calls["peer"]()
        assert made == ["peer"]


def test_a_peer_that_raises_costs_our_kernel_the_ratio_alone(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, way, rows = one_case(tmp_path, monkeypatch)
    case.peers = dict.fromkeys(case.peers, broken_peer)
    tune._Tuner(rows, CPU)._try_way(case, way)
    row = rows.found[case.op, case.problem, case.direction, way.name]
    assert (row["status"], row["time_s"]) == ("timed", 2e-3)
    assert row["reason"] == "timed alone; beside eager PyTorch: RuntimeError: the peer broke"
    assert "ratio" not in row
    assert "none" not in list(tune_rows.table(rows))[-1]


def test_a_peer_that_spoils_the_gpu_takes_part_no_more(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, way, rows = one_case(tmp_path, monkeypatch)
    case.peers = dict.fromkeys(case.peers, broken_peer)
    monkeypatch.setattr(tune, "_usable", lambda device: False)
    name = (case.op, case.problem, case.direction)
    tune._Tuner(rows, CPU)._try_way(case, way)
    assert rows.found[*name, way.name]["status"] == "unfinished"
    assert rows.found[*name, "eager PyTorch"]["status"] == "skipped"
    tune._Tuner(rows, CPU)._try_way(case, way)
    assert rows.found[*name, way.name]["status"] == "timed"


def one_case(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tune_cases.Case, tune_cases.Way, tune_rows.Rows]:
    """LayerNorm forward, of which one peer ran, and another that the case does not have."""
    problem = small("layer_norm", monkeypatch)
    case = next(tune_cases.cases(problem, tune_cases.Place.here(CPU)))
    rows = rows_in(folder)
    for peer, time_s in (("eager PyTorch", 1.0), ("gone", 0.5)):
        rows.add(**tune._head(case, peer, "peer"), status="timed", time_s=time_s)
    return case, case.ways[0], rows


def broken_peer() -> Any:
    raise RuntimeError("the peer broke")


def test_a_wrong_kernel_is_not_timed(
    tmp_path: Path, compared: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small("layer_norm", monkeypatch)
    right = layer_norm_kernels.layer_norm_fwd

    def wrong(*arguments: Any, **options: Any) -> Any:
        y, *others = right(*arguments, **options)
        y[3, 17] += 0.5
        return y, *others

    monkeypatch.setattr(layer_norm_kernels, "layer_norm_fwd", wrong)
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
    ("kind", "status"), [(RuntimeError, "failed"), (torch.OutOfMemoryError, "out of memory")]
)
def test_what_raises_leaves_a_row_and_the_others(
    kind: type[Exception],
    status: str,
    tmp_path: Path,
    compared: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small("layer_norm", monkeypatch)

    right = layer_norm_kernels.layer_norm_bwd

    def broken(*arguments: Any, **options: Any) -> Any:
        if arguments[0].is_meta:  # of a dry run, which launches nothing
            return right(*arguments, **options)
        raise kind("layer_norm_bwd on x (9, 512) failed to launch\nmore")

    monkeypatch.setattr(layer_norm_kernels, "layer_norm_bwd", broken)
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
        "out of memory"
    }
    assert any(row["status"] == "timed" for row in rows.found.values() if row["kind"] == "ours")
    (line,) = (line for line in tune_rows.table(rows) if large.text in line)
    assert line == f"| layer_norm {large.text} |  | none: out of memory | | | | | |"


class TestProcesses:
    """What the parent makes of processes that end in any way; each is a few lines of Python."""

    def command(self, script: str, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        prelude = f"""
            import json, os, sys, time
            def add(way, status, impl="triton", chosen=False):
                row = dict({HERE!r}, op="attention", problem="p", direction="d", way=way)
                row |= dict(kind="ours", impl=impl, chosen=chosen, status=status)
                row["about"] = row["about"][impl]
                with open({str(path)!r}, "a") as file:
                    file.write(json.dumps(row) + "\\n")
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

    @pytest.fixture
    def after_a_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Limits of a process count from its first row, which comes late on a busy machine."""
        wait = tune._wait

        def later(process: subprocess.Popen[Any], path: Path, until: float) -> tuple[int, str]:
            while process.poll() is None:
                *_, last = [""] + (path.read_text().splitlines() if path.exists() else [])
                if last and '"crashed"' not in last:  # which the parent wrote
                    break
                time.sleep(0.01)
            return wait(process, path, until)

        monkeypatch.setattr(tune, "_wait", later)

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

    def test_a_hang_is_ended(
        self, tmp_path: Path, after_a_row: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = """
            if "crashed" not in text:
                add("bad", "started")
                time.sleep(60)
            add("after", "failed")
        """
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        monkeypatch.setattr(tune, "_STUCK_S", 2.0)
        done, statuses = self.run(tmp_path)
        assert done
        assert statuses == {"bad": "crashed", "after": "failed"}

    def test_time_is_up(
        self, tmp_path: Path, after_a_row: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.command('add("slow", "started"); time.sleep(60)', monkeypatch, tmp_path / "tune.jsonl")
        monkeypatch.setattr(tune, "_GRACE_S", 0.0)
        done, statuses = self.run(tmp_path, seconds=0.7)
        assert not done
        assert statuses == {"slow": "unfinished"}

    def test_a_process_that_is_told_to_end_did_not_crash(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = f'add("bad", "started"); os.kill(os.getpid(), {signal.SIGTERM:d}); time.sleep(60)'
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        assert self.run(tmp_path) == (False, {"bad": "unfinished"})

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
        assert "| attention p d | triton | none: wrong |" in capsys.readouterr().out
        content = json.loads((tmp_path / "tune.json").read_text())
        assert content["finished"]
        assert content["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
        assert [row["status"] for row in content["rows"]] == ["wrong"]

    @pytest.mark.parametrize(
        ("impl", "chosen", "code"), [("triton", False, 0), ("triton", True, 1), ("cuda", False, 1)]
    )
    def test_a_crash_of_a_tile_that_is_not_chosen_is_excused(
        self,
        impl: str,
        chosen: bool,
        code: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        script = f"""
            if "crashed" not in text:
                add("bad", "started", {impl!r}, {chosen})
                os.abort()
        """
        self.command(script, monkeypatch, tmp_path / "tune.jsonl")
        assert tune.run(tmp_path, time.time() + 60, HERE) == code
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "attention p d: bad: crashed (its process ended with -6)"

    def test_sigterm_ends_the_children(self, tmp_path: Path) -> None:
        script = f"""
            import subprocess, sys
            from pathlib import Path
            from benchmarks import tune, tune_ahead
            start, wait, children = subprocess.Popen, tune._wait, []

            def sleeping(*_, **__):
                children.append(start([sys.executable, "-S", "-c", "import time; time.sleep(60)"]))
                return children[-1]

            def waiting(*arguments):
                print(*(child.pid for child in children), flush=True)
                return wait(*arguments)

            subprocess.Popen, tune._wait = sleeping, waiting
            tune_ahead._usable_cpus = lambda: 4
            with tune._stopped_in_order(), tune_ahead.compiling():
                tune.run(Path({str(tmp_path)!r}), {time.time() + 60}, {HERE!r})
        """
        run = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        children = [int(pid) for pid in run.stdout.readline().split()]
        assert len(children) == 3  # two compile, one times
        run.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)


def test_the_best_peer_is_the_fastest_that_ran(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    names = ["slow", "fast", "ours", "absent", "elsewhere"]
    assert tune_rows.best_peer("o", "p", "d", names, rows) is None
    for way, kind, status, time_s in (
        ("slow", "peer", "timed", 2.0),
        ("fast", "peer", "timed", 1.0),
        ("ours", "ours", "timed", 0.5),
        ("absent", "peer", "skipped", 0.1),
        ("gone", "peer", "timed", 0.1),
    ):
        rows.add(**(KEY | {"way": way}), kind=kind, status=status, time_s=time_s)
    rows.add(
        **(KEY | {"way": "elsewhere", "problem": "q"}), kind="peer", status="timed", time_s=0.1
    )
    assert tune_rows.best_peer("o", "p", "d", names, rows) == "fast"


def test_parts_cover_every_problem() -> None:
    assert [which for _, which in tune.PARTS] == sorted(3 * tune._WHICH, key=tune._WHICH.index)
    parts = [
        problem
        for op, which in tune.PARTS
        if which != "chosen"
        for problem in tune._problems(op, which)
    ]
    assert sorted(map(id, parts)) == sorted(map(id, predict.PROBLEMS))
    assert parts[0].sizes["D"] == 128
    assert parts[0].sizes["T"] == 8192
    assert tune._problems("gelu_mlp", "chosen") == tune._problems("gelu_mlp", "first")


@needs_triton
def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    """For a GPU that is not here; what is then launched on tensors with content finds them."""
    script = """
        import os, torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        class Driver:
            def get_current_device(self): return 0
            def get_current_stream(self, device=0): return 0
            def get_current_target(self): return GPUTarget("cuda", 90, 32)

        driver.set_active(Driver())
        from benchmarks import tune_ahead, tune_cases
        from gptkernels.bench import dry_run, predict
        from gptkernels.ops.layer_norm.triton import launch
        problem = dry_run.layer_norm(64, 512, torch.bfloat16, residual=True)
        predict.PROBLEMS = (problem,)
        run = JITFunction.run
        tune_ahead.compile_share(0, 8, torch.device("cuda"))
        tune_ahead.compile_share(1, 8, torch.device("cuda"))
        assert JITFunction.run is run
        made = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
        print(len(made))
        launch.forward_kernel.device_caches.clear()
        with tune_ahead._compiling_alone():
            place = tune_cases.Place(torch.device("cpu"), None, torch.device("cuda"))
            way = next(tune_cases.cases(problem, place)).ways[0]
            print(way.chosen)
            way.call()
        print(len(set(os.listdir(os.environ["TRITON_CACHE_DIR"])) - made))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = (sys.executable, "-c", textwrap.dedent(script))
    done = command(*words, env=environment)
    assert done.returncode == 0, done.stderr
    made, chosen, new = done.stdout.split()
    assert int(made) >= 3
    assert (chosen, new) == ("True", "0")


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 1), (5, 3), (64, 8)])
def test_processes_that_compile_share_all_and_end_with_the_run(
    cpus: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    real = tune_ahead.subprocess.Popen

    def start(words: list[str], **_: Any) -> Any:
        started.append(
            (words[-2:], real([sys.executable, "-S", "-c", "import time; time.sleep(60)"]))
        )
        return started[-1][1]

    monkeypatch.setattr(tune_ahead.subprocess, "Popen", start)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    with tune_ahead.compiling():
        assert all(process.poll() is None for _, process in started)
    assert [words for words, _ in started] == [
        [f"--share={i}", f"--of={count}"] for i in range(count)
    ]
    assert all(process.poll() is not None for _, process in started)


def test_processes_that_failed_to_compile_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    real = tune_ahead.subprocess.Popen

    def start(words: list[str], **_: Any) -> Any:
        words = [sys.executable, "-S", "-c", f"import sys; sys.exit({words[-2][-1]})"]
        started.append(real(words))
        return started[-1]

    monkeypatch.setattr(tune_ahead.subprocess, "Popen", start)
    monkeypatch.setattr(tune_ahead, "_usable_cpus", lambda: 4)
    with tune_ahead.compiling():
        for process in started:
            process.wait()
    said = capsys.readouterr().err
    assert said == "the process that compiled share 1 of 2 ahead ended with 1\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("nvcc", ["here", "lacking", "failing"])
def test_make_goes_on_without_nvcc(nvcc: str, tmp_path: Path) -> None:
    (tmp_path / "gptkernels").mkdir()
    module = tmp_path / "build" / "native" / "_cuda.so"
    module.parent.mkdir(parents=True)
    module.touch()
    (tmp_path / "gptkernels" / "_cuda.old.so").touch()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*extension.py*--check) exit {2 * (nvcc == 'lacking')};;\n"
        f"*extension.py*) exit {nvcc == 'failing':d};;\n-c*) echo 90; exit;;\nesac\n"
        'echo "$@"\n'
    )
    python.chmod(0o755)
    made = ("make", "-s", "-f", ROOT / "Makefile", "gpu-tune", f"PYTHON={python}")
    done = command(*made, cwd=tmp_path)
    assert (done.returncode == 0) == (nvcc != "failing")
    assert ("going on without the CUDA C++ kernels" in done.stdout) == (nvcc != "here")
    assert ("kernels: the build failed" in done.stdout) == (nvcc == "failing")
    assert "-m benchmarks.tune --results" in done.stdout
    there = {path.name for path in (tmp_path / "gptkernels").iterdir()}
    assert there == ({"_cuda.so", "_cuda.old.so"} if nvcc == "here" else set())


class TestMain:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(tune, "here", lambda device: HERE)
        monkeypatch.setattr(tune, "run", lambda results, until, about: 0)

    @pytest.mark.parametrize("lacking", [(), ("cuda",), ("triton",), ("cuda", "triton")])
    def test_says_what_is_lacking(
        self,
        lacking: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        compiled: list[str] = []

        @contextlib.contextmanager
        def compiling() -> Any:
            compiled.append("ahead")
            yield

        def unavailable(impl: str, *_: Any) -> str | None:
            return f"no {impl} here" if impl in lacking else None

        monkeypatch.setattr(tune_ahead, "compiling", compiling)
        monkeypatch.setattr(tune, "unavailable", unavailable)
        assert tune.main([]) == (2 if len(lacking) == 2 else 0)
        said = capsys.readouterr()
        assert compiled == ([] if "triton" in lacking else ["ahead"])
        if len(lacking) == 2:
            assert "the CUDA C++ kernels: no cuda here" in said.err
            return
        lines = [line for line in said.out.splitlines() if line.startswith("going on without ")]
        names = {"cuda": "the CUDA C++ kernels", "triton": "Triton's kernels"}
        assert lines == [f"going on without {names[impl]}: no {impl} here" for impl in lacking]

    def test_a_process_is_told_what_its_rows_are_about(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run_part(op: str, which: str, rows: tune_rows.Rows, _: Any, until: float) -> int:
            assert (op, which, until) == ("layer_norm", "rest", 12.5)
            assert (rows.path, rows.here) == (tmp_path / "tune.jsonl", HERE)
            return tune._POISONED

        monkeypatch.setattr(tune, "unavailable", lambda *_: None)
        monkeypatch.setattr(tune, "run_part", run_part)
        command = tune._command("layer_norm", "rest", tmp_path, 12.5, HERE)
        arguments = command[command.index("benchmarks.tune") + 1 :]
        assert tune.main(arguments) == tune._POISONED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
