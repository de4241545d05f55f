"""Timing. No test here depends on how fast anything is."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from gptkernels.bench import timing


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


def test_what_raises_in_a_comparison_alone_is_raised() -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        timing.compare({"a": out_of_memory})


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


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # Ranks from tables of the binomial distribution.
    [(1, 0, 0), (3, 0, 2), (5, 0, 4), (6, 0, 5), (8, 0, 7), (9, 1, 7), (12, 2, 9), (25, 7, 17),
     (100, 39, 60)],
)  # fmt: skip
def test_the_interval_of_the_median(count: int, low: int, high: int) -> None:
    found = timing.Timing.of([float(x) for x in reversed(range(count))])
    assert (found.low_s, found.high_s) == (low, high)
    assert found.time_s == (count - 1) / 2
    assert (found.min_s, found.rounds, len(found.samples)) == (0.0, count, count)
    assert set(found.as_dict()) == {"time_s", "low_s", "high_s", "min_s", "rounds", "host_s"}


def test_what_takes_the_host_long_is_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver queues so many kernels only. All candidates are timed in one way."""
    taken: list[str] = []

    def sampler(name: str) -> Any:
        return lambda *_: taken.append(name) or 1.0

    for name in ("_whole_sampler", "_cuda_sampler"):
        monkeypatch.setattr(timing, name, lambda *_, name=name: sampler(name))
    for host_s in ({"a": 1e-5, "b": 1e-4}, {"a": 1e-5, "b": 1.0}):
        monkeypatch.setattr(timing, "_host_s", lambda call, device, host_s=host_s: host_s[call()])
        calls = {name: (lambda name=name: name) for name in host_s}
        timing.compare(calls, device="cuda", budget_s=0.0, min_rounds=1)
    assert taken == ["_cuda_sampler"] * 2 + ["_whole_sampler"] * 2


def test_the_whole_of_an_eager_call() -> None:
    """The host's time is hidden behind a busy GPU alone."""
    samples = [1.0, 2.0, 4.0]
    assert timing.Timing.of(samples).whole == timing.Timing.of(samples)
    whole = timing.Timing.of(samples, 3.0).whole
    assert (whole.min_s, whole.time_s, whole.high_s) == (3.0, 3.0, 4.0)
