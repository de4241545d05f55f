"""What is said of the modules that an installation compiles."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from harness import ROOT

from gptkernels.cli import installed
from gptkernels.core import compiled


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def test_what_is_there_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cuda"):
        monkeypatch.setitem(sys.modules, f"gptkernels._{name}", ModuleType(name))
        monkeypatch.setattr(compiled, "absent", lambda _name: None)
    sys.modules["gptkernels._cuda"].compiled_for = "80+PTX, 90a"  # type: ignore[attr-defined]
    assert list(installed.compiled_lines("cuda")) == ["  cuda    for 80+PTX, 90a"]
    older, needs, command = installed.compiled_lines("cpu")
    assert older.startswith("  cpu     cannot be loaded: it is older than the package beside it")
    assert needs == "          to build them, with g++ or clang++ on PATH:"
    assert command.split() == [
        *("GPTKERNELS_BUILD_CPU=1", "pip", "install", "-v", "--no-deps", "-e", str(ROOT))
    ]


@pytest.mark.usefixtures("nothing_built")
def test_an_installation_names_the_way_to_the_kernels_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path / "gptkernels")
    assert compiled.why_absent("cuda") == (
        "this installation was built without CUDA kernels, as one is where no nvcc or no NVIDIA "
        "GPU is; with nvcc 12.8 or newer and g++ on PATH, in a checkout of the sources: "
        "GPTKERNELS_BUILD_CUDA=1 pip install -v --no-deps --force-reinstall ."
    )


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize(("system", "names"), [("win32", ["cpu", "cuda"]), ("darwin", ["cuda"])])
def test_systems_that_have_no_such_kernels(
    system: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    for name in names:
        assert compiled.why_absent(name) == f"the {name.upper()} kernels are not for {system}"
    said = [compiled.why_absent(name) for name in compiled.MODULES if name not in names]
    assert all("with g++ or clang++ on PATH" in str(reason) for reason in said)


def test_the_command_of_a_checkout_can_be_pasted_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "my code"
    checkout.mkdir()
    (checkout / "setup.py").touch()
    monkeypatch.setattr(compiled, "_PACKAGE", checkout / "gptkernels")
    _, command = compiled.remedy("cpu") or ("", "")
    assert shlex.split(command)[-2:] == ["-e", str(checkout)]
