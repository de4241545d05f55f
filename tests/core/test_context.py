"""The context of a launcher's thread (csrc/runtime/context.h), held to a driver of counters."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from harness import ROOT
from machines import HERE

pytest_plugins = ["machines"]

State = tuple[int, int, int]  # the thread's device, -1 for none; users of both primary contexts


class Driver:
    """tests/core/driver.cpp."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.error = ctypes.create_string_buffer(1024)

    def state(self) -> State:
        found = (ctypes.c_int * 3)()
        self.library.state(found)
        return found[0], found[1], found[2]

    def bound(self, device: int) -> State:
        """The state while the device is bound."""
        found, size = (ctypes.c_int * 3)(), ctypes.c_size_t(len(self.error))
        if self.library.bind_device(device, found, self.error, size):
            raise RuntimeError(self.error.value.decode())
        return found[0], found[1], found[2]

    def lacks(self, version: int, name: str) -> str:
        size = ctypes.c_size_t(len(self.error))
        self.library.lacks(version, name.encode(), self.error, size)
        return self.error.value.decode()


@pytest.fixture(scope="module")
def driver(extension: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    if not HERE.endswith("Linux"):
        pytest.skip(f"CUDA kernels are built on Linux only, and this is {HERE}")
    try:
        compiler, headers = extension._compiler(), extension._cuda_headers()
    except extension.BuildError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("driver") / "driver.so"
    names = ("context", "driver", "dry_run")
    sources = ["tests/core/driver.cpp", *(f"csrc/runtime/{name}.cpp" for name in names)]
    flags = [*extension._HOST_FLAGS, "-shared", "-Icsrc", f"-isystem{headers}"]
    subprocess.run([*compiler, *flags, *sources, "-o", library], cwd=ROOT, check=True)
    return Driver(library)


@pytest.mark.parametrize(
    ("device", "before", "between"),
    [
        (0, (-1, 1, 0), (0, 2, 0)),  # a new thread
        (1, (-1, 0, 1), (1, 0, 2)),  # a new thread, and nobody has used device 0
        (0, (0, 1, 0), (0, 1, 0)),  # a thread that has the context
        (1, (0, 1, 1), (1, 1, 2)),
        (0, (1, 1, 1), (0, 2, 1)),
    ],
)
def test_a_thread_gets_a_context_of_its_launch_and_keeps_its_own(
    driver: Driver, device: int, before: State, between: State
) -> None:
    driver.library.begin(*before)
    assert driver.bound(device) == between
    assert driver.state() == before


def test_a_device_that_is_not_there_is_named(driver: Driver) -> None:
    driver.library.begin(-1, 0, 0)
    sentence = "device 2 cannot be used: the driver returned error 101"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        driver.bound(2)
    assert driver.state() == (-1, 0, 0)


def test_a_driver_that_is_too_old_or_missing_is_told_in_a_sentence(driver: Driver) -> None:
    made = f"{driver.library.compiled_with() // 1000}.{driver.library.compiled_with() % 1000 // 10}"
    asked = "the driver could not be asked for its functions"
    assert driver.lacks(12040, "cuCtxGetDevice") == (
        f"{asked}: the kernels were compiled with CUDA {made}, and the NVIDIA driver is made for "
        "CUDA 12.4; update the driver or compile them with that CUDA"
    )
    assert driver.lacks(0, "cuCtxGetDevice") == f"{asked}: there is no NVIDIA driver"
    assert driver.lacks(-1, "cuSomething") == (
        "the driver is too old for cuSomething: one of CUDA 12.0 or newer has it"
    )
