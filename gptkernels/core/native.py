"""Calls of the CUDA C++ kernels. Only this module touches the compiled module, addresses and
streams.

Natively the kernels run on CUDA tensors, from the extension `gptkernels._cuda`. With
GPTKERNELS_EMULATE=1 in the environment they run on CPU tensors, from the same sources compiled for
the emulator (`make emulator` in a checkout). The emulator checks every memory access, and is slow.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import compiled

# A process runs either all its kernels natively or all of them emulated.
EMULATED = os.environ.get("GPTKERNELS_EMULATE", "").lower() in ("1", "true", "on")
# The GPU that the emulator imitates: sm80, or sm90 with Hopper's own kernels. Each launch reads it.
ARCH_VARIABLE, ARCHITECTURES = "GPTKERNELS_EMULATE_ARCH", ("sm80", "sm90")
_CHECKOUT = Path(__file__).resolve().parents[2]
_EMULATOR = _CHECKOUT / "build" / "emulator" / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
_OLDEST_CAPABILITY = (8, 0)

# The emulator handles one launch at a time, but autograd and users call from several threads.
_ONE_AT_A_TIME = threading.RLock()

# The address of every tensor in a dry run: aligned as PyTorch's allocations are, and never read.
_SOMEWHERE = 1 << 20

# Functions of the module whose fields have been compared with those of a call.
_AGREED: set[str] = set()

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable(device_type: str) -> str | None:
    """Returns why the kernels cannot run on tensors of this device type; None where they can."""
    if EMULATED:
        if device_type != "cpu":
            return (
                f"GPTKERNELS_EMULATE=1 runs it on CPU tensors, this one is on {device_type}; "
                "unset it to run on a GPU"
            )
        return _emulator_unavailable()
    if device_type != "cuda":
        return (
            f"it runs on CUDA tensors (this one is on {device_type}), "
            "or on CPU tensors under GPTKERNELS_EMULATE=1"
        )
    return _native_unavailable()


# torch.compile cannot trace a look at files and devices, so it takes the answer as a constant.
# torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes a
# second.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _emulator_unavailable() -> str | None:
    if _EMULATOR.exists():
        return None
    return "the emulator is not built here; `make emulator` builds it in a checkout of the sources"


@functools.cache
def _native_unavailable() -> str | None:
    reason = compiled.why_absent("cuda")
    if reason is not None:
        return reason
    # One GPU that is new enough is enough here. A launch on an older one beside it fails with an
    # error of its own.
    devices = range(torch.cuda.device_count())
    capability = max((torch.cuda.get_device_capability(i) for i in devices), default=(0, 0))
    if capability < _OLDEST_CAPABILITY:
        found = "{}.{}".format(*capability) if devices else "none"
        return f"it needs a GPU of compute capability 8.0 or later, and there is {found}"
    try:  # PyTorch's CUDA may be older than the one that the kernels were compiled with
        _native().capability(0)
    except RuntimeError as error:
        return str(error)
    return None


def module() -> Any:
    """Returns the compiled module. Raises ImportError with one sentence where there is none."""
    if _DRY.module is not None:
        return _DRY.module
    if EMULATED:
        with _ONE_AT_A_TIME:  # otherwise two threads could load it twice
            return _emulator()
    return _native()


@functools.cache
def _native() -> Any:
    return importlib.import_module("gptkernels._cuda")


@functools.cache
def _emulator() -> Any:
    reason = _emulator_unavailable()
    if reason is not None:
        raise ImportError(reason)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(_EMULATOR))
    spec = importlib.util.spec_from_file_location("_cuda", _EMULATOR, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


class _Dry(threading.local):
    """The module that this thread makes a dry run with; None outside a dry run."""

    module: Any = None


_DRY = _Dry()


def dry_run(run: Callable[[], Any], *, capability: int, multiprocessors: int) -> dict[str, Any]:
    """Returns what `run` would launch on a GPU with this compute capability and this number of
    multiprocessors. `run` calls the launchers with meta tensors. Nothing is launched, and no GPU is
    needed.

    The result has "launches", each with kernel, shape, grid, threads, cluster, shared_bytes, tiles
    (the tiles of work that a persistent grid shares, else 0) and built (the `gk::Build`, or None).
    It also has "refusals", pairs of a kernel made for that GPU and why the kernel cannot take the
    problem.

    Raises ImportError with one sentence where no module is built, natively or for the emulator.
    """
    _DRY.module = dry_run_module()
    try:
        return _DRY.module.dry_run(capability, multiprocessors, run)
    finally:
        _DRY.module = None


def record(run: Callable[[], Any]) -> dict[str, Any]:
    """Runs `run`, and returns what it launches on the calling thread, in the form of `dry_run`.

    PyTorch runs the backward passes of CPU tensors on that thread too, but those of CUDA tensors on
    others. Raises ImportError as `module` does.
    """
    return module().record(run)


def dry_run_module() -> Any:
    """Returns the module whose launchers make dry runs. Raises ImportError with one sentence where
    there is none."""
    if not EMULATED and importlib.util.find_spec("gptkernels._cuda") is not None:
        return _native()
    if not _EMULATOR.exists():
        raise ImportError(
            "a dry run needs the CUDA C++ kernels: an installation that compiled them, or "
            "`make emulator` in a checkout of the sources"
        )
    with _ONE_AT_A_TIME:
        return _emulator()


def dtype_code(dtype: torch.dtype) -> int:
    """Returns the value that a dtype has in `gk::DType`."""
    return _CODES[dtype]


def call(
    function: str,
    like: Tensor,
    /,
    *,
    inputs: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor | None],
    workspaces: Mapping[str, torch.dtype] | None = None,
    **scalars: Any,
) -> Any:
    """Calls a function of the compiled module, and returns its result. The function launches
    kernels on the device of `like` and on its current stream, asynchronously.

    Tensors are passed by address; None and empty tensors are passed as 0. Kernels only read inputs,
    and read outputs only where the same call has written them; the emulator checks both. Workspaces
    are outputs that this function allocates, with the sizes that `<function>_workspaces` of the
    module returns.

    Arguments are passed by position, in the order of the module's `fields`. Raises TypeError with
    the first name that differs from them (they are compared at the first call of each
    function), and RuntimeError with the kernel, the shape and the cause
    where a launch fails.
    """
    target, needed = module(), workspaces or {}
    if function not in _AGREED:
        _compare(function, (*inputs, *outputs, *needed, *scalars), target.fields[function])
    where = 0, 0
    if not EMULATED and _DRY.module is None:
        device = like.get_device()
        # torch.cuda.current_stream() wraps the same number in an object, which takes far longer.
        where = device, torch._C._cuda_getCurrentRawStream(device)
    given = [*map(_address, inputs.values()), *map(_address, outputs.values())]
    values = scalars.values()
    if needed:
        sizes = getattr(target, f"{function}_workspaces")
        made = allocate(needed, sizes(*where, *given, *[0] * len(needed), *values), like.device)
        given += map(_address, made.values())
        outputs = {**outputs, **made}
    if EMULATED and _DRY.module is None:
        return _emulate(function, inputs, outputs, given, values)
    return getattr(target, function)(*where, *given, *values)


def allocate(
    dtypes: Mapping[str, torch.dtype], sizes: Iterable[int], device: torch.device
) -> dict[str, Tensor | None]:
    """Returns a workspace for each dtype and number of elements; None for 0 elements."""
    return {
        name: torch.empty(size, dtype=dtype, device=device) if size else None
        for (name, dtype), size in zip(dtypes.items(), sizes, strict=True)
    }


def _compare(function: str, given: Sequence[str], fields: Sequence[str]) -> None:
    """Compares the names of a call with the module's, once for each function."""
    if given == fields:
        _AGREED.add(function)
        return
    pairs = enumerate(itertools.zip_longest(given, fields, fillvalue="nothing more"))
    place, (name, field) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise TypeError(
        f"field {place} of the compiled module's {function} must be {field}, got {name}: the call "
        "has another order, or the module is older than gptkernels"
    )


def _address(tensor: Tensor | None) -> int:
    """Returns a tensor's address, and 0 for None and for an empty tensor. In a dry run all other
    tensors have one fixed address."""
    if tensor is None or not tensor.numel():
        return 0
    return tensor.data_ptr() if _DRY.module is None else _SOMEWHERE


def _emulate(
    function: str,
    inputs: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor | None],
    addresses: Sequence[int],
    values: Iterable[Any],
) -> Any:
    tensors = [(item, True) for item in inputs.items()] + [
        (item, False) for item in outputs.items()
    ]
    with _ONE_AT_A_TIME:
        emulator = module()
        try:
            for ((name, tensor), written), address in zip(tensors, addresses, strict=True):
                if tensor is not None and address:
                    emulator.emulator_declare(name, address, _extent(tensor), written)
            return getattr(emulator, function)(0, 0, *addresses, *values)
        finally:
            emulator.emulator_forget()


def _extent(tensor: Tensor) -> int:
    """Returns the number of bytes from the first element to the end of the last one."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.element_size()
