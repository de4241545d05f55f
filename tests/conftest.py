"""Where there is no GPU the Triton kernels run in Triton's interpreter, and the CUDA C++ kernels in
the emulator, both on CPU tensors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated: before any is imported
    os.environ["GPTKERNELS_EMULATE"] = "1"  # read when gptkernels is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

pytest_plugins = ["machines"]
# Their failed asserts show values too.
pytest.register_assert_rewrite("attention_cases", "emulated", "right", "training")

# Interpreted kernels are slow: no deadline, and a failing example is printed as found, not shrunk
# for minutes.
settings.register_profile(
    "kernels",
    deadline=None,
    max_examples=15,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")


def pytest_configure(config: pytest.Config) -> None:
    """Neighbours run in one worker, which alone makes what they share."""
    if getattr(config.option, "dist", "no") == "load":  # what xdist's -n chooses
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    code: Any
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one command in this process, with no emulator: "cuda" cannot run without a GPU."""
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
