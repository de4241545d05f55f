"""Cases become rows. Times are made up here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkernels.bench import measure, timing
from gptkernels.bench.case import Case
from gptkernels.bench.text import figures
from gptkernels.core import ceilings


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call returns the seconds that it takes; a machine of 100 bytes/s and 1,000 FLOP/s."""

    def compare(calls: dict[str, Callable[[], Any]], **_: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing.of([0.9 * s, s, 1.1 * s]) for name, s in seconds(calls)}

    def seconds(calls: dict[str, Callable[[], Any]]) -> Any:
        return [(name, call()) for name, call in calls.items()]

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(ceilings, "memory_rate", lambda device, working_set: 100.0)
    monkeypatch.setattr(ceilings, "product_rate", lambda device, dtype: 1000.0)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 5)


def takes(seconds: float) -> Callable[[], Callable[[], float]]:
    """What makes a call."""
    return lambda: lambda: seconds


def raises(error: BaseException, when: str = "called") -> Callable[[], Callable[[], float]]:
    def call() -> float:
        raise error

    return (lambda: call) if when == "called" else call  # type: ignore[return-value]


def rows(**of: Any) -> dict[str, dict[str, Any]]:
    case = Case(
        **{"op": "attention", "shape": "B1", "dtype": torch.float16, "direction": "forward",
           "plain": takes(2.0), **of}
    )  # fmt: skip
    return {row["impl"]: row for row in measure.measure(case)}


def test_a_row_stands_beside_the_others() -> None:
    found = rows(
        ours={"cpu": takes(0.5), "torch": takes(1.0)},
        peers={"SDPA": takes(1.0), "slow": takes(4.0)},
        bytes_moved=20, flops=100, tokens=10, sizes={"B": 1}, series="causal",
        skipped={"triton": "no reason"},
    )  # fmt: skip
    assert list(found) == ["pytorch", "cpu", "torch", "SDPA", "slow", "triton"]
    kinds = ["baseline", "ours", "ours", "peer", "peer", "ours"]
    assert [row["kind"] for row in found.values()] == kinds
    cpu = found["cpu"]
    head = {name: cpu[name] for name in ("op", "shape", "sizes", "series", "dtype", "direction")}
    assert head == dict(op="attention", shape="B1", sizes={"B": 1}, series="causal",
                        dtype="float16", direction="forward")  # fmt: skip
    assert (cpu["time_s"], cpu["rounds"], cpu["baseline_s"], cpu["ratio"]) == (0.5, 3, 2.0, 4.0)
    assert "samples" not in cpu
    assert cpu["ratio_spread"] == pytest.approx(0.1 * 2**0.5)
    assert (cpu["verdict"], cpu["best_peer"], cpu["peer_ratio"]) == ("faster", "SDPA", 2.0)
    assert found["torch"]["peer_verdict"] == "same"
    assert found["pytorch"]["ratio"] == 1.0
    assert "best_peer" not in found["SDPA"]
    assert (found["slow"]["ratio"], found["slow"]["verdict"]) == (0.5, "slower")
    # 20 bytes take 0.2 s at least, 100 operations 0.1 s.
    assert (cpu["bound"], cpu["ceiling"], cpu["floor_s"]) == ("memory", 100.0, 0.2)
    assert (cpu["efficiency"], cpu["no_efficiency"]) == (0.4, None)
    assert (cpu["bytes_per_s"], cpu["flops_per_s"], cpu["tokens_per_s"]) == (40.0, 200.0, 20.0)
    assert (cpu["memory_ceiling"], cpu["product_ceiling"]) == (100.0, 1000.0)
    assert cpu["peak_bytes"] == 5
    assert found["triton"]["skipped"] == "no reason"
    assert found["triton"]["time_s"] is None
    assert not found["triton"]["failed"]


@pytest.mark.parametrize(
    ("bytes_moved", "flops", "share", "why"),
    [
        (100, 0, 0.5, None),
        (0, 1500, 0.75, None),
        (100, 1500, 0.75, None),
        (0, 0, None, "neither its bytes nor its operations"),
        (201, 0, None, "fastest copy or read of as many bytes"),
        (0, 2001, None, "fastest products of as many operations"),
    ],
)
def test_no_efficiency_is_above_the_ceiling(
    bytes_moved: int, flops: int, share: float | None, why: str | None
) -> None:
    row = rows(bytes_moved=bytes_moved, flops=flops)["pytorch"]
    assert row["efficiency"] == share
    assert (why is None) == (row["no_efficiency"] is None)
    assert why is None or why in row["no_efficiency"]
    assert ("ceiling" in figures(row)) == (share is not None)


def test_a_machine_without_ceilings_has_no_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "memory_rate", lambda device, working_set: None)
    row = rows(bytes_moved=100)["pytorch"]
    assert (row["efficiency"], row["bound"]) == (None, None)
    assert "no ceiling could be measured" in row["no_efficiency"]


@pytest.mark.parametrize(
    ("ratio", "within", "said"),
    [(1.04, 0.05, "same"), (1 / 1.04, 0.05, "same"), (1.06, 0.05, "faster"),
     (1 / 1.06, 0.05, "slower"), (1.001, 0.0, "faster"), (1.0, 0.0, "same")],
)  # fmt: skip
def test_a_ratio_within_the_spread_is_neither(ratio: float, within: float, said: str) -> None:
    assert measure.verdict(ratio, within) == said


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB\nand more")


@pytest.mark.parametrize(
    ("error", "kind", "failed", "said"),
    [
        (NotImplementedError("it has no window"), "peers", False, "it has no window"),
        (NotImplementedError("it has no window"), "ours", False, "it has no window"),
        (OUT_OF_MEMORY, "ours", False,
         "OutOfMemoryError: CUDA out of memory. Tried to allocate 34 GiB"),
        (RuntimeError("No available kernel"), "peers", False, "RuntimeError: No available kernel"),
        (RuntimeError("illegal access"), "ours", True, "RuntimeError: illegal access"),
        (ImportError("undefined symbol"), "peers", True, "ImportError: undefined symbol"),
        (TypeError("no such argument"), "peers", True, "TypeError: no such argument"),
        (RuntimeError(), "ours", True, "RuntimeError"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["made", "called"])
def test_what_raises_is_a_row_and_the_others_are_timed(
    error: BaseException, kind: str, failed: bool, said: str, when: str
) -> None:
    found = rows(**{kind: {"it": raises(error, when)}})
    assert found["pytorch"]["time_s"] == 2.0
    row = found["it"]
    assert (row["time_s"], row["failed"], row["skipped"]) == (None, failed, said)
    assert figures(row) == {"time": f"skipped: {said}"}


def test_without_a_baseline_there_is_no_ratio() -> None:
    found = rows(plain=raises(OUT_OF_MEMORY), ours={"cpu": takes(1.0)}, peers={"SDPA": takes(3.0)})
    cpu = found["cpu"]
    assert (cpu["ratio"], cpu["verdict"], cpu["baseline_s"]) == (None, None, None)
    assert (cpu["best_peer"], cpu["peer_ratio"]) == ("SDPA", 3.0)


def test_nothing_that_runs_is_no_error() -> None:
    assert [row["time_s"] for row in rows(plain=raises(OUT_OF_MEMORY)).values()] == [None]


def test_a_wrong_result_of_ours_is_not_timed() -> None:
    found = rows(
        ours={"cpu": takes(1.0), "torch": takes(3.0), "cuda": takes(float("nan"))},
        peers={"SDPA": takes(1.0)},
        check=lambda result: (result / 10, 0.2),
    )
    assert (found["torch"]["error"], found["torch"]["limit"]) == (0.3, 0.2)
    for wrong in ("torch", "cuda"):
        assert found[wrong]["failed"]
        assert found[wrong]["time_s"] is None
    assert "its error is 3.0e-01, beyond the limit of 2.0e-01" in found["torch"]["skipped"]
    assert (found["cpu"]["error"], found["cpu"]["time_s"]) == (0.1, 1.0)
    assert figures(found["cpu"])["error"] == "0.50"


def test_a_wrong_result_of_a_peer_is_told_and_timed() -> None:
    found = rows(
        ours={"cpu": takes(0.1)},
        peers={"near": takes(0.5), "wrong": takes(0.3), "nan": takes(0.2)},
        check=lambda result: ({0.3: 9.0, 0.2: float("nan")}.get(result, result), 0.1),
    )
    for name, error in (("near", 0.5), ("wrong", 9.0), ("nan", None)):
        assert found[name]["error"] == error
        assert found[name]["time_s"] is not None
    assert [n for n, row in found.items() if row.get("wrong")] == ["pytorch", "wrong", "nan"]
    assert found["cpu"]["best_peer"] == "near"  # though the others take less


def test_what_raises_beside_the_others_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it has memory enough."""
    compare, calls = timing.compare, []

    def greedy() -> float:
        calls.append(1)
        if len(calls) > 2:  # tried, and its memory measured
            raise OUT_OF_MEMORY
        return 1.0

    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: call() and None)
    found = rows(ours={"cpu": takes(1.0)}, peers={"greedy": lambda: greedy})
    assert compare is timing.compare
    assert found["greedy"]["time_s"] is None
    assert "OutOfMemoryError" in found["greedy"]["skipped"]
    assert not found["greedy"]["failed"]
    assert found["cpu"]["ratio"] == 2.0


def test_slow_calls_get_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def compare(calls: Any, **options: Any) -> Any:
        rounds.append(options["min_rounds"])
        return {name: timing.Timing.of([1.0]) for name in calls}

    monkeypatch.setattr(timing, "compare", compare)
    clock = iter([0.0, 0.1, 0.0, 1.1])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    rows()
    rows()
    assert rounds == [5, 3]


def test_ceilings_belong_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to a kind of device: a machine's GPUs may differ."""
    asked: list[torch.device] = []

    def rate(device: torch.device, *_: Any) -> float:
        asked.append(device)
        return 1.0

    monkeypatch.setattr(ceilings, "memory_rate", rate)
    monkeypatch.setattr(ceilings, "product_rate", rate)
    case = Case("op", "shape", torch.float32, "forward", takes(1.0), bytes_moved=1, flops=1)
    assert len(measure.measure(case, device="cpu:0")) == 1
    assert asked == [torch.device("cpu:0")] * 2


def test_figures_are_short() -> None:
    row = {"time_s": 1e-5, "low_s": 0.9e-5, "high_s": 1.1e-5, "host_s": 1e-4, "ratio": 2.0,
           "peer_ratio": 1.5, "flops_per_s": 2e12, "bytes_per_s": 1e9, "bound": "arithmetic",
           "efficiency": 0.63, "error": 1e-3, "limit": 4e-3, "peak_bytes": 3_100_000}  # fmt: skip
    assert figures(row) == {
        "time": "10 us", "spread": "10%", "host": "100 us", "PyTorch": "2.00x", "best": "1.50x",
        "rate": "2 TFLOP/s", "ceiling": "63%", "error": "0.25", "memory": "2.96 MiB",
    }  # fmt: skip
