"""What test modules share: paths, dtypes, and which implementations can run here. right.py compares
results with the truth or bit for bit; op_inputs.py makes the inputs of ops."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkernels.core import native
from gptkernels.core.choice import IMPLEMENTATIONS, unavailable

ROOT = Path(__file__).resolve().parent.parent
# Test data that is not committed. Tests that use it are skipped where it is missing.
DATA = Path(os.environ.get("GPTKERNELS_DATA") or ROOT.parent / "shared" / "data")

FP32, FP16, BF16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Without a GPU the kernels run on CPU tensors (see conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those that run here.
HERE = [impl for impl in IMPLEMENTATIONS if unavailable(impl, DEVICE, FP32) is None]


def command(
    *words: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; what it prints is text."""
    line = [str(word) for word in words]
    return subprocess.run(
        line, cwd=cwd, env=env, check=check, timeout=timeout, capture_output=True, text=True
    )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's ops, and ours on a CPU, run on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of(
    impl: str, *values: Any, dtype: torch.dtype = FP32, device: str = DEVICE, **options: Any
) -> Any:
    """Returns the parameters of a test that runs `impl`. The test is skipped, with a reason, where
    `impl` cannot run."""
    reason = unavailable(impl, device, dtype)
    skip = pytest.mark.skipif(reason is not None, reason=f"impl={impl!r}: {reason}")
    return pytest.param(impl, *values, marks=skip, **options)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runnable(impls: Iterable[str]) -> list[Any]:
    return [
        of(impl, dtype, dtype=dtype, id=f"{impl}-{name_of(dtype)}")
        for impl in impls
        for dtype in DTYPES
    ]


RUNNABLE = _runnable(IMPLEMENTATIONS)
runnable = pytest.mark.parametrize(("impl", "dtype"), RUNNABLE)
each = pytest.mark.parametrize("impl", [of(impl) for impl in IMPLEMENTATIONS])
each_kernel = pytest.mark.parametrize("impl", [of("triton"), of("cuda")])
each_kernel_with_cpu = pytest.mark.parametrize("impl", [of("triton"), of("cuda"), of("cpu")])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
(needs_cuda,) = of("cuda").marks
needs_dry_run = pytest.mark.skipif(
    not native._EMULATOR.exists() and native.unavailable("cuda") is not None,
    reason="the CUDA C++ kernels are not built; `make emulator` builds them for this CPU",
)
emulated = pytest.mark.skipif(not native.EMULATED, reason="of the emulator: a GPU has one schedule")
