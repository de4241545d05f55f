"""One way to time, shared by every benchmark, the demo and the command line.

Candidates of one comparison run in one process and alternate, so that drifting clocks and busy
neighbours hit them alike. Each round gives one sample per candidate; the median of the samples is
the figure and the least is kept beside it.

On a GPU a sample is the time between two CUDA events around one call, after the L2 cache was
flushed (a write of twice its size). The GPU then waits for longer than the host takes to queue the
call, so that the sample holds the GPU's work alone; the host's time is measured apart. A call that
waits for the GPU itself still has the host's time after that wait in its sample. Where the host
needs milliseconds to queue one of the candidates, as whole models do, a sample of each is the time
from an idle GPU to the next. On a CPU a sample is `time.perf_counter` around as many calls as fill
a few milliseconds; freed memory stays with the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# A shorter sample on a CPU would mostly measure the clock and the scheduler.
_CPU_SAMPLE_S = 2e-3
_FLUSH_FACTOR = 2
# The GPU waits this much longer than the host took to queue the call in the warm-up.
_HOST_MARGIN = 1.5
# A driver queues about a thousand kernels. What takes the host longer to queue, such as a whole
# model, would not be queued before the GPU begins with it.
_LONG_HOST_S = 3e-3
# torch.cuda._sleep counts cycles. No GPU has a faster clock than this, so none waits too short.
_FASTEST_CLOCK_HZ = 3e9


@dataclass(frozen=True)
class Timing:
    """Seconds per call: `time_s` is the median of `rounds` samples, `min_s` is the least.

    `low_s` and `high_s` are the samples between which the true median lies with 95%, whatever their
    distribution (ranks by the binomial one); the least and the greatest of fewer than six, which
    hold it with 75% (three) or 94% (five).

    On a GPU `host_s` is what the host takes to queue the call; None on a CPU. `samples` are all, as
    they came.
    """

    time_s: float
    low_s: float
    high_s: float
    min_s: float
    rounds: int
    host_s: float | None = None
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float], host_s: float | None = None) -> Timing:
        """The timing of these samples, of which there is at least one."""
        found, rank = sorted(samples), _rank(len(samples))
        median = statistics.median(samples)
        bounds = found[rank], found[-1 - rank]
        return cls(median, *bounds, found[0], len(samples), host_s, tuple(samples))

    @property
    def whole(self) -> Timing:
        """Of an eager call: the larger of a sample and the host's time, which hides behind a busy
        GPU alone."""
        if self.host_s is None:
            return self
        return Timing.of([max(sample, self.host_s) for sample in self.samples], self.host_s)

    def as_dict(self) -> dict[str, Any]:
        """What a row has of it: all but the samples."""
        found = dataclasses.asdict(self)
        del found["samples"]
        return found


@functools.cache
def _rank(count: int) -> int:
    """How many of so many samples lie below the interval, and above: as many as leave 2.5% at most
    on each side."""
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return max(0, rank - 1)


def compare(
    candidates: dict[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    warm_ups: int = 2,
) -> dict[str, Timing]:
    """Times the candidates against each other.

    Args:
        candidates: name -> a call with no arguments, whose result is dropped.
        device: where the calls run; it decides how a sample is taken.
        budget_s: rounds stop once the comparison has taken this long, but not before `min_rounds`.
        min_rounds: least number of samples per candidate.
        max_rounds: greatest number of samples per candidate.
        warm_ups: calls of each candidate before that, which compile kernels and fill caches.

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
        for _ in range(warm_ups):
            call()
    host_s: dict[str, float] = {}
    if device.type == "cuda":
        host_s = {name: _host_s(call, device) for name, call in candidates.items()}
        long = max(host_s.values()) > _LONG_HOST_S
        sampler = _whole_sampler(device) if long else _cuda_sampler(device, host_s)
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
    if sys.platform != "linux":
        return
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


def _whole_sampler(device: torch.device) -> Callable[[str, Callable[[], Any]], float]:
    def sample(name: str, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return sample


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
