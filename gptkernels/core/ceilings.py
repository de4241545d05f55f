"""Ceilings: the rates that this machine reaches, which a kernel's time is held against.

Two rates, each the best of what was ever measured here:

    memory(working set)   bytes a second, read plus written: a copy, and a sum that only reads. On a
                          CPU a small set lies in a cache, so the rate depends on its size
    products(dtype)       FLOP a second of matrix products of several sizes

Other programs can only slow a measurement down, so the best one counts, of this process and of
earlier ones: they are kept for each machine, number of threads and version of PyTorch, in
`ceilings.json` of the user's cache folder (`core.machine`). A rate is measured, in several passes,
where none is kept; `measure` measures again, as every run of benchmarks does. Where the file cannot
be written, each process has its own measurements alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gptkernels.core.files import replacing
from gptkernels.core.machine import cache_folder, fingerprint

_FILE = "ceilings.json"
_PASSES = 3
_QUEUEING_CLOCKS = 200_000  # about 0.1 ms
_PASS_S = 0.03  # a rate is measured for at least so long in each pass
# Bytes, from a core's own cache to memory. A GPU's cache is flushed before each measurement.
_CPU_SETS = tuple(1 << bits for bits in range(16, 29, 2))
_GPU_SETS = (1 << 30,)
_CPU_SIZES, _GPU_SIZES = (256, 512, 1024, 2048), (4096, 8192)


def product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP a second of the best products on `device`, in `dtype` or in fp32: an implementation may
    compute in either. None on a device that is neither a CPU nor a GPU of NVIDIA's, and where no
    memory is left."""
    either = {dtype, torch.float32}
    for one in either:
        if _name(one) not in known(device)["products"]:
            _measure(device, functools.partial(_product_pass, device, one))
    rates = known(device)["products"]
    return max((rates[_name(one)] for one in either if _name(one) in rates), default=None)


def memory_rate(device: torch.device, working_set: int) -> float | None:
    """Bytes a second that `device` can read and write, if a call touches so many; None as above.

    That of the best set which is not smaller. The next smaller one counts too: caches end between
    the two.
    """
    if not known(device)["memory"]:
        _measure(device, functools.partial(_memory_pass, device))
    rates = dict(known(device)["memory"])
    fits = max((size for size in rates if size <= working_set), default=0)
    return max((rate for size, rate in rates.items() if size >= fits), default=None)


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
    """Measures the memory's rates and the products' of these dtypes and fp32 again."""
    _measure(device, functools.partial(_memory_pass, device))
    for dtype in {*dtypes, torch.float32}:
        _measure(device, functools.partial(_product_pass, device, dtype))


def known(device: torch.device) -> dict[str, Any]:
    """What is kept of a device, as results files have it: "products", dtype -> FLOP a second;
    "memory", pairs of a working set in bytes and bytes a second, in order."""
    products: dict[str, float] = {}
    memory: dict[int, float] = {}
    for name, rate in _kept(device).items():
        kind, what, _ = name.split()
        if kind == "products":
            products[what] = max(rate, products.get(what, 0.0))
        else:
            memory[int(what)] = max(rate, memory.get(int(what), 0.0))
    return {"products": products, "memory": [list(pair) for pair in sorted(memory.items())]}


def one_pass(device: torch.device, dtypes: Iterable[torch.dtype]) -> Iterator[tuple[str, float]]:
    """Yields (name, rate) of one measurement of everything. Names are those of the file:
    "memory <bytes> <copy or read>", "products <dtype> <size>"."""
    yield from _memory_pass(device)
    for dtype in dtypes:
        yield from _product_pass(device, dtype)


def _measure(device: torch.device, once: Callable[[], Iterator[tuple[str, float]]]) -> None:
    """Some passes, whose best rates are kept."""
    if device.type not in ("cpu", "cuda"):
        return
    with contextlib.suppress(torch.OutOfMemoryError):
        for _ in range(_PASSES):
            _keep(device, dict(once()))


def _memory_pass(device: torch.device) -> Iterator[tuple[str, float]]:
    for size in _GPU_SETS if device.type == "cuda" else _CPU_SETS:
        # Of two halves one is copied to the other; the sum reads both.
        whole = torch.ones(size // 4, device=device)
        target, source = whole.chunk(2)
        copy = functools.partial(target.copy_, source)
        yield f"memory {size} copy", size / _fastest(copy, device)
        yield f"memory {size} read", size / _fastest(whole.sum, device)


def _product_pass(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    # Random data, since a GPU multiplies zeros at a higher clock; of a generator of its own, since
    # a training run measures too and must draw what it draws without.
    generator = torch.Generator(device).manual_seed(0)
    for n in _GPU_SIZES if device.type == "cuda" else _CPU_SIZES:
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b.t(), out=torch.empty_like(a))
        seconds = _fastest(product, device)
        yield f"products {_name(dtype)} {n}", 2 * n**3 / seconds
        if seconds > _PASS_S:  # a larger one would be no faster, and take eight times as long
            return


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest call."""
    call()
    once = _cuda_clock(device) if device.type == "cuda" else _cpu_clock()
    best, ends = once(call), time.perf_counter() + _PASS_S
    while time.perf_counter() < ends:
        best = min(best, once(call))
    return best


def _cpu_clock() -> Callable[[Callable[[], Any]], float]:
    def once(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return once


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    def once(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            # The GPU waits while the host queues the call, which would be within the time.
            torch.cuda._sleep(_QUEUEING_CLOCKS)
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return once


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What this process knows of each machine: the file's content, and its own measurements.
_KEPT: dict[str, dict[str, float]] = {}


def _kept(device: torch.device) -> dict[str, float]:
    machine = fingerprint(device)
    if machine not in _KEPT:
        _KEPT[machine] = _machines().get(machine, {})
    return _KEPT[machine]


def _keep(device: torch.device, rates: dict[str, float]) -> None:
    """Adds rates to what is known of a device, here and in the file."""
    kept = _kept(device)
    machines = _machines()
    # What another process has measured meanwhile counts too.
    for name, rate in [*machines.get(fingerprint(device), {}).items(), *rates.items()]:
        kept[name] = max(rate, kept.get(name, 0.0))
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder() / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**machines, fingerprint(device): kept}, indent=1) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _machines() -> dict[str, dict[str, float]]:
    """The file's content. One that was damaged is as good as none: all can be measured again."""
    try:
        found = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
        machines = {
            str(machine): {str(name): float(rate) for name, rate in rates.items()}
            for machine, rates in found.items()
        }
        for kind, what, _ in (name.split() for rates in machines.values() for name in rates):
            if kind == "memory":
                int(what)
        return machines
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):  # or without a home
        return {}
