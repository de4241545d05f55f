"""Where the small kernels run: in the emulator, built once a session, and on a GPU."""

from __future__ import annotations

import platform
from types import ModuleType

import pytest
import torch
from emulated import Emulator, Gpu, sources
from harness import ROOT

MACHINE = f"{platform.machine()} {platform.system()}"


@pytest.fixture(autouse=True, scope="session")
def _supported() -> None:
    if MACHINE not in ("x86_64 Linux", "aarch64 Linux"):
        pytest.skip(f"the emulator runs on x86-64 and aarch64 Linux, and this is {MACHINE}")


@pytest.fixture(scope="session")
def emulator(extension: ModuleType) -> Emulator:
    try:
        return Emulator(extension.emulated(sources(), ROOT / "build" / "emulator_kernels"))
    except extension.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, extension: ModuleType) -> Emulator:
    """What a building block gives is the same on both."""
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    stems = ("cases", "primitives", "tiles", "dropout")
    chosen = sources(*stems, "sm90/wgmma", "sm90/mbarriers", "sm90/clusters")
    try:
        return Gpu(extension.native_library(chosen, ROOT / "build" / "native_kernels"))
    except extension.BuildError as error:
        pytest.skip(str(error))
