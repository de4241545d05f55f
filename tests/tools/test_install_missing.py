"""`make ... PYTHON=python3`: what is installed into an environment that is in use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from harness import ROOT


class Environment:
    """What scripts/install_missing.py finds installed, and what it asks pip for."""

    def __init__(self, script: ModuleType, versions: dict[str, str]) -> None:
        self.script = script
        self.versions = versions
        self.pip: list[tuple[list[str], list[str]]] = []  # (wanted, constraints)
        self.pip_fails = 0

    def distributions(self) -> list[Any]:
        return [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in self.versions.items()]

    def run_pip(self, arguments: list[str]) -> int:
        option, file, *wanted = arguments
        assert option == "--constraint"
        self.pip.append((wanted, Path(file).read_text().splitlines()))
        self.pip_fails -= 1
        return int(self.pip_fails >= 0)

    def triton(self) -> list[list[str]]:
        """What each call of pip was told about Triton."""
        return [[c for c in constraints if c.startswith("triton")] for _, constraints in self.pip]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Everything as it was tested, with other builds of PyTorch."""
    spec = importlib.util.spec_from_file_location("it", ROOT / "scripts" / "install_missing.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = dict(line.split(";")[0].split("==") for line in lines if "==" in line)
    found = Environment(script, versions | {"torch": "2.13.0+cpu", "setuptools": "80.9.0"})
    monkeypatch.setattr(importlib.metadata, "distributions", found.distributions)
    monkeypatch.setattr(script, "_pip", found.run_pip)
    monkeypatch.setattr(script, "_is_editable_here", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    return found


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cu130", "2.14.0a0+git1234567", "3.0"])
def test_nothing_is_installed_where_nothing_is_missing(
    torch: str, environment: Environment
) -> None:
    environment.versions["torch"] = torch
    assert environment.script.main() == 0
    assert environment.pip == []


@pytest.mark.parametrize("nvcc", ["/usr/local/cuda/bin/nvcc", None])
def test_cuda_headers_come_where_there_is_no_toolkit(
    nvcc: str | None, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", {"nvcc": nvcc}.get)
    headers = ["nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-runtime"]
    for name in headers:
        del environment.versions[name]
    assert environment.script.main() == 0
    wanted = [re.split("[<>]", text)[0] for texts, _ in environment.pip for text in texts]
    assert wanted == ([] if nvcc else headers)


def test_an_old_setuptools_is_brought_up_to_date(environment: Environment) -> None:
    environment.versions["setuptools"] = "65.5.0"
    assert environment.script.main() == 0
    ((wanted, constraints),) = environment.pip
    assert wanted == ["setuptools>=77"]
    assert not any(line.startswith("setuptools") for line in constraints)
    assert "torch==2.13.0+cpu" in constraints


def test_what_is_too_old_is_named_and_nothing_is_replaced(
    environment: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.versions |= {"torch": "2.5.1+cu124", "pytest_benchmark": "4.0"}
    del environment.versions["pytest-benchmark"]
    assert environment.script.main() == 2
    assert environment.pip == []
    assert capsys.readouterr().err == (
        "torch 2.5.1+cu124 is installed, >=2.11 is wanted; "
        "pytest-benchmark 4.0 is installed, >=5.1 is wanted; nothing is replaced\n"
    )


@pytest.mark.parametrize(
    ("torch", "triton"),
    [
        ("2.11.0+cpu", ["triton==3.6.0"]),
        ("2.12.1", ["triton==3.7.1"]),
        ("2.13.0", ["triton==3.7.1"]),
        ("2.14.0a0+git1234567", ["triton==3.8.*"]),
        ("2.15.2", ["triton==3.9.*"]),
        ("2.16.0", []),
    ],
)
def test_triton_comes_in_the_version_of_the_torch_that_is_there(
    torch: str, triton: list[str], environment: Environment
) -> None:
    environment.versions["torch"] = torch
    del environment.versions["triton"]
    environment.pip_fails = 1
    assert environment.script.main() == 0
    assert [wanted for wanted, _ in environment.pip] == [["triton<3.10,>=3.6"]] * 2
    assert environment.triton() == [triton] * 2
    for _, constraints in environment.pip:
        assert f"torch=={torch}" in constraints


def test_without_torch_the_tested_versions_come_together(environment: Environment) -> None:
    del environment.versions["torch"]
    del environment.versions["triton"]
    assert environment.script.main() == 0
    ((wanted, constraints),) = environment.pip
    assert wanted == ["torch>=2.11", "triton<3.10,>=3.6"]
    assert "torch==2.13.0" in constraints
    assert environment.triton() == [['triton==3.7.1; sys_platform == "linux"']]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("gpu", [False, True])
def test_make_compiles_kernels_for_a_gpu_that_is_here(tmp_path: Path, gpu: bool) -> None:
    """An install without one leaves them out; with one no test runs those of older sources."""
    programs = {
        "python": 'printf "%s %s\\n" "${GPTKERNELS_BUILD_CUDA-unset}" "$*"',
        "nvidia-smi": "echo 'GPU 0: NVIDIA H200'" if gpu else "exit 9",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "-f", str(ROOT / "Makefile"), "test", "PYTHON=python", "JOBS=1"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    native = [
        "unset scripts/extension.py native --check",
        "unset setup.py --quiet build_ext --inplace",
    ]
    assert [line for line in done.stdout.splitlines() if " -c " not in line] == [
        f"{'unset' if gpu else '0'} scripts/install_missing.py",
        "unset scripts/extension.py emulator",
        *(native if gpu else []),
        "unset -m pytest -n 1",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["gpu", "gpu-tune"])
def test_make_gpu_without_a_gpu_says_so_and_builds_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    done = subprocess.run(
        ["make", "-s", "-f", str(ROOT / "Makefile"), target, f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    sentence = f"make {target} needs an NVIDIA GPU that PyTorch can use, and finds none"
    assert done.stderr.splitlines()[0] == sentence
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("arguments", "triton"),
    [
        ("", True),
        ("--compiler nvcc", False),
        ("--compiler=nvcc", False),
        ("--compiler builds", False),
    ],
)
def test_make_gates_of_nvcc_leave_triton_out(arguments: str, triton: bool) -> None:
    command = ["make", "-n", "gates", "PYTHON=python", f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"-m gates {arguments}" in done.stdout
    assert ("-m gates --triton" in done.stdout) == triton


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("lacking", [False, True])
def test_make_gpu_keeps_paths_and_leaves_the_interpreter(tmp_path: Path, lacking: bool) -> None:
    """With the CUDA kernels, and where they cannot be built."""
    checkout = tmp_path / "a checkout"
    for folder in ("gptkernels", "benchmarks", "examples"):
        (checkout / folder).mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    for folder in ("emulator", "native"):  # as scripts/extension.py leaves them
        module = checkout / "build" / folder / "_cuda.so"
        module.parent.mkdir(parents=True)
        module.write_text(folder)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*extension.py*--check) {'echo no nvcc; exit 2' if lacking else 'exit'};;\n"
        "*extension.py*) exit;;\n-c*) echo 90; exit;;\nesac\n"
        'printf "%s\\n" "$PYTHONPATH" "${TRITON_INTERPRET-unset}" "$@"\n'
    )
    python.chmod(0o755)
    for given, expected in (
        ({}, f"{checkout}"),
        ({"PYTHONPATH": "/some:/where"}, f"{checkout}:/some:/where"),
    ):
        done = subprocess.run(
            ["make", "-s", "gpu", f"PYTHON={python}", "RESULTS=my results"],
            cwd=checkout,
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "TRITON_INTERPRET": "1",
                **given,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        arguments = ["-P", "-m", "benchmarks.gpu", "--results", "my results"]
        said = ["no nvcc", "going on without the CUDA C++ kernels"] if lacking else []
        assert done.stdout.splitlines() == [*said, expected, "unset", *arguments]
        module = checkout / "gptkernels" / "_cuda.so"
        assert (module.read_text() == "native") if not lacking else not module.exists()
