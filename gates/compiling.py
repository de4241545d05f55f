"""Compiles the Triton kernels ahead of time, and reads from the cubin what each uses.

TRITON_INTERPRET must not be set, since interpreted kernels cannot be compiled. Results are cached
under build/gates, by kernel source, types, constants, options and Triton's version, so a second run
compiles only what has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pkgutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gates import sass
from gates.table import SHARED_LIMITS, Key, Resources
from gptkernels import ops
from gptkernels.core.triton_support import Shipped

CACHE = Path(__file__).resolve().parent.parent / "build" / "gates"
_WARP = 32


@functools.cache
def configurations() -> dict[str, Shipped]:
    """Returns name -> configuration, for every Triton module in `gptkernels.ops`.

    Raises ValueError if two configurations have one name, or if the limit of an architecture is
    unknown.
    """
    found: dict[str, Shipped] = {}
    for shipped in _shipped():
        if shipped.name in found:
            raise ValueError(f"two shipped configurations are named {shipped.name!r}")
        unknown = set(shipped.architectures) - set(SHARED_LIMITS)
        if unknown:
            raise ValueError(f"{shipped.name}: no limits are known for {sorted(unknown)}")
        found[shipped.name] = shipped
    return found


def one_of_each_kernel(architecture: int) -> list[str]:
    """Returns the names of one configuration for each kernel and its types, among those for
    `architecture`. It takes the last one, which is the widest with every option."""
    found = {
        (shipped.kernel.__name__, *shipped.signature.items()): name
        for name, shipped in configurations().items()
        if architecture in shipped.architectures
    }
    return list(found.values())


def measure_all(keys: list[Key], jobs: int) -> Iterator[tuple[Key, Resources]]:
    """Yields each configuration and architecture with its resources; `jobs` processes compile."""
    if jobs == 1 or len(keys) == 1:
        yield from ((key, measure(key)) for key in keys)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(measure, key): key for key in keys}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def measure(key: Key) -> Resources:
    """Compiles one configuration for one architecture, or takes its result from the cache."""
    name, architecture = key
    shipped = configurations()[name]
    kernel = shipped.kernel
    signature = {n: shipped.signature.get(n, "constexpr") for n in kernel.arg_names}
    attributes = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in shipped.divisible_by_16
    }
    source = ASTSource(kernel, signature, dict(shipped.constexprs), attributes)
    options = {
        "num_warps": shipped.num_warps,
        "num_stages": shipped.num_stages,
        "enable_fp_fusion": True,
    }
    what = f"{triton.__version__} {architecture} {sorted(options.items())} {source.hash()} {_how()}"
    kept = CACHE / f"{hashlib.sha256(what.encode()).hexdigest()}.json"
    if kept.exists():
        return Resources(**json.loads(kept.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        # Triton's own cache would keep every stage of every kernel, hundreds of MB in all.
        os.environ["TRITON_CACHE_DIR"] = folder
        compiled = triton.compile(
            source, target=GPUTarget("cuda", architecture, _WARP), options=options
        )
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = read(cubin, compiled.metadata.shared)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(asdict(resources)))
    partial.replace(kept)
    return resources


def read(cubin: Path, shared: int) -> Resources:
    """Returns the registers, spills and stack of the kernel in a cubin. Raises RuntimeError if the
    cubin cannot be read."""
    kernels = list(sass.usage(cubin).values())
    if len(kernels) != 1:
        raise RuntimeError(f"cuobjdump -res-usage printed the resources of {len(kernels)} kernels")
    (used,) = kernels
    spills = 0
    if used.stack:  # only kernels with a stack can spill, and disassembling is slow
        spills = sum(sass.is_spill(found) for _, found in sass.instructions(cubin))
    return replace(used, spills=spills, shared=shared)


def _shipped() -> Iterator[Shipped]:
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if "triton" not in module.name.split("."):
            continue
        shipped = getattr(importlib.import_module(module.name), "shipped", None)
        if shipped is not None and shipped.__module__ == module.name:
            yield from shipped()


@functools.cache
def _how() -> str:
    """Returns a hash of this file and of `gates.sass`: a change of either makes cached results
    stale."""
    files = (__file__, sass.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
