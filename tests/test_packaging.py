"""What is installed: sdist, wheel, an environment with nothing else in it, the declared extras."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gptkernels.info import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(
    *command: str | Path, cwd: Path, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    if path is not None:
        environment["PYTHONPATH"] = path
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the standard library alone: no torch, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="module")
def archives(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, by the bare Python and the build's own requirements.

    They are made as an isolated build makes them, with what `build-system.requires` names and
    nothing else on the path; only they come from this environment instead of the network.
    """
    backend = tmp_path_factory.mktemp("backend")
    for requirement in PROJECT["build-system"]["requires"]:
        copy_distribution(re.split(r"[<>=!~ ]", requirement)[0], backend)
    source = tmp_path_factory.mktemp("source") / "gptkernels"
    copy_checkout(source)
    folder = tmp_path_factory.mktemp("dist")
    sdist = build(bare, "sdist", source, folder, backend)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build(bare, "wheel", unpacked, folder, backend)


def copy_distribution(name: str, folder: Path) -> None:
    """Makes an installed distribution importable from `folder`, apart from everything beside it."""
    files = importlib.metadata.files(name) or []
    tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        origin = Path(importlib.metadata.distribution(name).locate_file(top))
        if not top.endswith(".pth"):
            copy: Callable[..., Any] = shutil.copytree if origin.is_dir() else shutil.copy2
            copy(origin, folder / top)


def copy_checkout(target: Path) -> None:
    """The checkout's files, without builds and caches."""
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__", "results", "demo-report", "runs"
        ),
    )


def build(python: Path, kind: str, source: Path, folder: Path, backend: Path) -> Path:
    """Calls the build backend's hook as a front end would; returns the archive."""
    hook = f"from setuptools import build_meta as b; print(b.build_{kind}({str(folder)!r}))"
    done = run(python, "-c", hook, cwd=source, path=str(backend))
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_isolated_build_sees_no_torch(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-c", "import torch", cwd=tmp_path)
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


def test_wheel_has_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(archives[1]).namelist())
    for expected in (
        "gptkernels/__init__.py",
        "gptkernels/py.typed",
        "gptkernels/ops/layer_norm.py",
        "gptkernels/triton_kernels/layer_norm.py",
        "gptkernels/gpt/model.py",
        "gptkernels/benchmarks/timing.py",
        "gptkernels/benchmarks/bench_layer_norm.py",
        "gptkernels/examples/plain_gpt.py",
    ):
        assert expected in names
    packages = [
        name for name in names if name.endswith(".py") and not name.startswith("gptkernels/")
    ]
    assert packages == []
    assert not [name for name in names if "tests/" in name or name.endswith((".so", ".pyc"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_every_module_of_the_checkout(archives: tuple[Path, Path]) -> None:
    """A package that pyproject.toml forgets to list would be missing."""
    names = set(zipfile.ZipFile(archives[1]).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gptkernels").rglob("*.py")}
    for folder in ("benchmarks", "examples"):
        modules |= {f"gptkernels/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert modules <= names


def test_template_files_are_in_the_wheel(archives: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(archives[1]).namelist())
    data = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gptkernels").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert set(data) <= names


def test_metadata(archives: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(archives[1])
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    text = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert re.search(r"^Requires-Dist: torch>=2\.11$", text, re.M)
    assert re.search(r"^Requires-Dist: triton<3\.10,>=3\.6; sys_platform == .linux.$", text, re.M)


def test_sdist_can_run_the_tests(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for expected in (
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "scripts/install_missing.py",
    ):
        assert expected in names


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as an installer lays it out."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(archives[1]).extractall(folder)
    return folder


def test_bare_environment_imports(bare: Path, installed: Path, tmp_path: Path) -> None:
    done = run(
        bare,
        "-c",
        "import gptkernels as g; print(g.__version__)",
        cwd=tmp_path,
        path=str(installed),
    )
    assert done.stderr == ""
    assert done.stdout.strip() == version()


def test_bare_environment_info_says_what_is_missing(
    bare: Path, installed: Path, tmp_path: Path
) -> None:
    done = run(bare, "-m", "gptkernels", "info", cwd=tmp_path, path=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert "PyTorch     missing: pip install torch" in done.stdout
    for extra in EXTRAS:
        assert f"pip install 'gptkernels[{extra}]'" in done.stdout


@pytest.mark.parametrize("command", ["verify", "demo", "train", "generate", "bench"])
def test_bare_environment_other_commands_name_their_extra(
    command: str, bare: Path, installed: Path, tmp_path: Path
) -> None:
    done = run(bare, "-m", "gptkernels", command, cwd=tmp_path, path=str(installed))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'gptkernels[cli]'" in done.stderr


def test_import_needs_neither_triton_nor_extras_and_leaves_cuda_alone(tmp_path: Path) -> None:
    code = """
import sys
for name in ("triton", "numpy", "click", "rich", "tokenizers", "safetensors", "matplotlib"):
    sys.modules[name] = None
import torch, gptkernels
x = torch.randn(3, 8)
y = gptkernels.layer_norm(x, torch.ones(8))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
assert not torch.cuda.is_initialized()
from gptkernels.ops.choice import unavailable
print(unavailable("triton", "cpu", torch.float32))
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path, path=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def version() -> str:
    tree = ast.parse((ROOT / "gptkernels" / "__init__.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__"
    )
    return ast.literal_eval(value)


def test_info_knows_the_declared_extras() -> None:
    declared = {
        extra: {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements}
        for extra, requirements in PROJECT["project"]["optional-dependencies"].items()
        if extra != "all"
    }
    assert {extra: set(names) for extra, names in EXTRAS.items()} == declared
    (everything,) = PROJECT["project"]["optional-dependencies"]["all"]
    assert set(re.split(r"[\[\],]", everything)[1:-1]) == set(declared)


def test_every_declared_dependency_is_pinned() -> None:
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    declared = set().union(*EXTRAS.values()) | {"torch", "triton"}
    # PyTorch bounds setuptools differently in each of its versions.
    assert declared - {"setuptools"} <= pinned


def test_no_reference_to_a_build_of_torch() -> None:
    """A local version such as 2.13.0+cpu would shut out machines with a GPU."""
    assert "+c" not in (ROOT / "constraints.txt").read_text()


# ---- `make ... PYTHON=python3`


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
def test_make_gpu_keeps_paths_and_leaves_the_interpreter(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    for folder in ("gptkernels", "benchmarks", "examples"):
        (checkout / folder).mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "${TRITON_INTERPRET-unset}" "$@"\n')
    python.chmod(0o755)
    built = checkout / "build" / "gpu"
    for given, expected in (
        ({}, f"{built}"),
        ({"PYTHONPATH": "/some:/where"}, f"{built}:/some:/where"),
    ):
        done = subprocess.run(
            ["make", "-s", "gpu", f"PYTHON={python}", "RESULTS=my results"],
            cwd=checkout,
            env={"PATH": os.environ["PATH"], "TRITON_INTERPRET": "1", **given},
            capture_output=True,
            text=True,
            check=True,
        )
        arguments = ["-P", "-m", "gptkernels.benchmarks.gpu", "--results", "my results"]
        assert done.stdout.splitlines() == [expected, "unset", *arguments]
