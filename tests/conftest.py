"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter and the CUDA C++
kernels in the emulator, both on CPU tensors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import setuptools  # noqa: F401 - it replaces distutils, and complains if that is imported before
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before a kernel is decorated
    os.environ["GPTKERNELS_EMULATE"] = "1"  # must be set before gptkernels is imported
# Inductor keeps what it compiles, and takes code for AVX-512 from there where ATEN_CPU_CAPABILITY
# allows AVX2 alone: results are then garbage. So each capability has a folder of its own.
_INDUCTOR = f"inductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parent.parent / "build" / _INDUCTOR)
)
# What is measured here must not become what the user's machine is held to.
os.environ.setdefault(
    "GPTKERNELS_CACHE", str(Path(__file__).resolve().parent.parent / "build" / "measured")
)
# Nor must what was measured here choose what the tests run.
os.environ["GPTKERNELS_TUNE"] = "off"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import interpreter  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

interpreter.improve()
pytest_plugins = ["machines"]
# pytest then shows the values in failed asserts of these modules too.
pytest.register_assert_rewrite("attention_cases", "emulated", "right", "training")

# Interpreted kernels are slow, so examples have no deadline, and a failing example is printed as
# found: shrinking it would take minutes.
settings.register_profile(
    "kernels",
    deadline=None,
    max_examples=10,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")


def pytest_configure(config: pytest.Config) -> None:
    """Makes xdist run the tests of a file in one worker, so that only that worker builds the
    fixtures that they share. Files with the most tests begin."""
    if getattr(config.option, "dist", "no") == "load":  # the default of xdist's -n
        config.option.dist = "loadfile"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with a reason, the tests that need a GPU where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@dataclasses.dataclass
class Result:
    """The outcome of a command."""

    code: Any
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one command in this process, without the emulator, so impl="cuda" needs a GPU."""
    from gptkernels.cli import main
    from gptkernels.core import native

    monkeypatch.setattr(native, "EMULATED", False)

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as exited:
            main.run([str(argument) for argument in arguments])
        return Result(exited.value.code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh inputs for every test on every run; the seed is printed with a failure."""
    value = int(os.environ.get("GPTKERNELS_TEST_SEED", "0")) or int.from_bytes(os.urandom(3), "big")
    print(f"GPTKERNELS_TEST_SEED={value} replays this test's inputs")
    torch.manual_seed(value)
    return value
