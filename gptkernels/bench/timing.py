"""One way to time, shared by every benchmark, the demo and the command line.

Candidates of one comparison run in one process and alternate, so that drifting clocks and busy
neighbours hit them alike. Each round gives one sample per candidate; the median of the samples is
the figure and the least is kept beside it.

On a GPU a sample is the time between two CUDA events around one call, after the L2 cache was
flushed (a write of twice its size). The GPU then waits for longer than the host takes to queue the
call, so that the sample holds the GPU's work alone; the host's time is measured apart. A call that
waits for the GPU itself still has the host's time after that wait in its sample. On a CPU a sample
is `time.perf_counter` around as many calls as fill a few milliseconds; freed memory stays with the
process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.core.choice import unavailable

# A shorter sample on a CPU would mostly measure the clock and the scheduler.
_CPU_SAMPLE_S = 2e-3
_FLUSH_FACTOR = 2
# The GPU waits this much longer than the host took to queue the call in the warm-up.
_HOST_MARGIN = 1.5
# torch.cuda._sleep counts cycles. No GPU has a faster clock than this, so none waits too short.
_FASTEST_CLOCK_HZ = 3e9
BASELINE = "pytorch"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: `time_s` is the median of `rounds` samples, `low_s` and `high_s` are their
    quartiles and `min_s` is the least.

    On a GPU `host_s` is what the host takes to queue the call; None on a CPU.
    """

    time_s: float
    low_s: float
    high_s: float
    min_s: float
    rounds: int
    host_s: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float], host_s: float | None = None) -> Timing:
        """The timing of these samples, of which there is at least one."""
        low, median, high = (
            statistics.quantiles(samples, n=4, method="inclusive")
            if len(samples) > 1
            else [samples[0]] * 3
        )
        return cls(median, low, high, min(samples), len(samples), host_s)


@dataclass(frozen=True)
class Case:
    """One shape of one operator: what to call, and what the machine has to move and compute for it.

    Args:
        op: the operator's name, as in `gptkernels.<op>`.
        shape: readable sizes, such as "B8 T1024 C768".
        dtype: dtype of the activations.
        direction: "forward" or "forward+backward".
        candidates: implementation -> a call with no arguments; "pytorch" is the baseline.
        bytes_moved: bytes that any implementation must read and write, 0 where not counted.
        flops: floating-point operations that any implementation must do, 0 where not counted.
        skipped: implementation -> why it cannot run here.
    """

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    candidates: dict[str, Callable[[], Any]]
    bytes_moved: int = 0
    flops: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def beside(
        cls,
        plain: Callable[[], Any],
        ours: Callable[[str], Callable[[], Any]],
        impls: Sequence[str],
        device: torch.device | str,
        **about: Any,
    ) -> Case:
        """Plain PyTorch, and `ours(impl)` for each of `impls` that can be timed here. `about` are
        the other fields."""
        reasons = {impl: untimeable(impl, device, about["dtype"]) for impl in impls}
        skipped = {impl: reason for impl, reason in reasons.items() if reason is not None}
        timed = {impl: ours(impl) for impl in impls if impl not in skipped}
        return cls(candidates={BASELINE: plain, **timed}, skipped=skipped, **about)


def untimeable(impl: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why timing an implementation of an op here would fail or say nothing; None where it can be
    timed."""
    device = torch.device(device)
    reason = unavailable(impl, device.type, dtype)
    if reason is None and impl in ("triton", "cuda") and device.type != "cuda":
        where = "Triton's interpreter" if impl == "triton" else "the emulator"
        return f"it would run in {where}, whose time says nothing about the kernels"
    return reason


def compare(
    candidates: dict[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Times the candidates against each other.

    Args:
        candidates: name -> a call with no arguments, whose result is dropped.
        device: where the calls run; it decides how a sample is taken.
        budget_s: rounds stop once the comparison has taken this long, but not before `min_rounds`.
        min_rounds: least number of samples per candidate.
        max_rounds: greatest number of samples per candidate.

    Returns:
        Name -> `Timing`, in the order of `candidates`.

    Raises:
        ValueError: there is no candidate, or the bounds on the rounds contradict each other.
    """
    if not candidates:
        raise ValueError("candidates is empty; it must name at least one call to time")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            f"min_rounds is {min_rounds} and max_rounds is {max_rounds}; "
            "they must satisfy 1 <= min_rounds <= max_rounds"
        )
    device = torch.device(device)
    if device.type == "cpu":
        _keep_freed_memory()
    for call in candidates.values():
        # The first calls compile kernels and fill caches.
        call()
        call()
    host_s: dict[str, float] = {}
    if device.type == "cuda":
        host_s = {name: _host_s(call, device) for name, call in candidates.items()}
        sampler = _cuda_sampler(device, host_s)
    else:
        sampler = _cpu_sampler()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > budget_s:
            break
        for name, call in candidates.items():
            samples[name].append(sampler(name, call))
    return {name: Timing.of(values, host_s.get(name)) for name, values in samples.items()}


@functools.cache
def _keep_freed_memory() -> None:
    """Lets the C library keep memory that is freed. By default it gives blocks of some megabytes
    back to the system, or not, as they happen to lie; the page faults of the next ones can take
    longer than the kernels that fill them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _cpu_sampler() -> Callable[[str, Callable[[], Any]], float]:
    repeats: dict[str, int] = {}

    def sample(name: str, call: Callable[[], Any]) -> float:
        if name not in repeats:
            started = time.perf_counter()
            call()
            once = time.perf_counter() - started
            repeats[name] = max(1, math.ceil(_CPU_SAMPLE_S / max(once, 1e-7)))
        started = time.perf_counter()
        for _ in range(repeats[name]):
            call()
        return (time.perf_counter() - started) / repeats[name]

    return sample


def _host_s(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds that the host takes to queue the call on an idle GPU."""
    samples = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    return statistics.median(samples)


def _cuda_sampler(
    device: torch.device, host_s: dict[str, float]
) -> Callable[[str, Callable[[], Any]], float]:
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(
        max(_FLUSH_FACTOR * cache_bytes, 1 << 20) // 4, dtype=torch.int32, device=device
    )

    def sample(name: str, call: Callable[[], Any]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            flush.zero_()
            torch.cuda._sleep(math.ceil(_HOST_MARGIN * host_s[name] * _FASTEST_CLOCK_HZ))
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return sample


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Best measured bytes per second (read plus written) of a large copy: memory's ceiling."""
    size = 1 << 30 if device.type == "cuda" else 1 << 27
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, device=device, budget_s=0.5)
    return 2 * size / timing["copy"].min_s


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Best measured FLOP per second of a large matrix product: arithmetic's ceiling."""
    n = 8192 if device.type == "cuda" else 1024
    # Random data, since a GPU multiplies zeros at a higher clock.
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    timing = compare({"product": lambda: a @ b}, device=device, budget_s=0.5)
    return 2 * n**3 / timing["product"].min_s


def rows(
    cases: Iterable[Case], *, device: torch.device | str = "cpu", budget_s: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Times each case and yields one row per implementation, as soon as its case is timed.

    A row has op, shape, dtype, direction, impl, time_s, baseline_s, ratio (baseline over time:
    above 1 is faster than PyTorch), the other fields of `Timing`, bytes, flops,
    bytes_per_s, flops_per_s, floor_s (the larger of bytes over `copy_bandwidth` and flops over
    `product_rate`) and floor_share (floor over time; 1 is the machine's limit). An implementation
    that cannot run, or raises (no memory is left, say), has time_s None and the reason in
    "skipped"; where that is PyTorch, baseline_s and ratio of the others are None.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for case in cases:
        skipped = dict(case.skipped)
        running = {}
        for impl, call in case.candidates.items():
            reason = _failure(call, device)
            if reason is None:
                running[impl] = call
            else:
                skipped[impl] = reason
        timings = compare(running, device=device, budget_s=budget_s) if running else {}
        baseline = timings.get(BASELINE)
        floor = _floor(case, device) if running else None
        head = {
            "op": case.op,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": case.direction,
        }
        for impl, timing in timings.items():
            time_s = timing.time_s
            yield {
                **head,
                "impl": impl,
                **dataclasses.asdict(timing),
                "baseline_s": baseline.time_s if baseline else None,
                "ratio": baseline.time_s / time_s if baseline else None,
                "bytes": case.bytes_moved or None,
                "flops": case.flops or None,
                "bytes_per_s": case.bytes_moved / time_s if case.bytes_moved else None,
                "flops_per_s": case.flops / time_s if case.flops else None,
                "floor_s": floor,
                "floor_share": floor / time_s if floor else None,
            }
        for impl, reason in skipped.items():
            yield {**head, "impl": impl, "time_s": None, "skipped": reason}


def _failure(call: Callable[[], Any], device: torch.device) -> str | None:
    """Runs the call once. Returns the error in one line where it raises, None where it works."""
    try:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
    # The next candidate needs the memory, which the error's frames held until here.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return reason


def _floor(case: Case, device: torch.device) -> float | None:
    try:
        memory = case.bytes_moved / copy_bandwidth(device) if case.bytes_moved else 0.0
        arithmetic = case.flops / product_rate(device, case.dtype) if case.flops else 0.0
    except torch.OutOfMemoryError:  # the ceilings need 2 GiB beside the case
        return None
    return max(memory, arithmetic) or None
