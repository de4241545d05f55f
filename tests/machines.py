"""Machines that tests run on, as fixtures. A plugin: conftest.py loads it, and so do the test files
that `benchmarks.gpu` runs without conftest.py."""

from __future__ import annotations

import importlib
import platform
import sys
from types import ModuleType

import pytest
import torch
from emulated import Machine, sources
from harness import ROOT

HERE = f"{platform.machine()} {platform.system()}"


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """scripts/extension.py."""
    sys.path.append(str(ROOT / "scripts"))  # the scripts are not a package
    return importlib.import_module("extension")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of compute capability 9.0: the emulator says that it is one, a GPU has to be."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm90")


@pytest.fixture(scope="session")
def emulator(extension: ModuleType) -> Machine:
    """The emulator with the small kernels of tests/emulator/kernels."""
    if HERE not in ("x86_64 Linux", "aarch64 Linux"):
        pytest.skip(f"the emulator runs on x86-64 and aarch64 Linux, and this is {HERE}")
    try:
        return Machine(extension.emulated(sources(), ROOT / "build" / "emulator_kernels"))
    except extension.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, extension: ModuleType) -> Machine:
    """The emulator or a GPU. A building block must have the same result on both."""
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    hopper = ("sm90/wgmma", "sm90/mbarriers", "sm90/clusters", "sm90/tma")
    chosen = sources("cases", "primitives", "tiles", "dropout", *hopper)
    try:
        return Machine(extension.native_library(chosen, ROOT / "build" / "native_kernels"), "cuda")
    except extension.BuildError as error:
        pytest.skip(str(error))
