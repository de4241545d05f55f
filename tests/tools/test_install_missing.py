"""`make ... PYTHON=python3`: what is installed into an environment that is in use."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pip
import pytest
from harness import ROOT, command

SCRIPT = ROOT / "scripts" / "install_missing.py"
TESTED = dict(
    line.split(";")[0].split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
)


class Environment:
    """What the script finds installed, and what it asks pip for: everything as it was tested."""

    def __init__(self, script: ModuleType) -> None:
        self.script = script
        self.versions = TESTED | {"setuptools": "80.9.0"}
        self.calls: list[tuple[str, ...]] = []
        self.kept: list[list[str]] = []  # the constraints of each call
        self.failing = 0  # calls that fail, of the first ones

    def distributions(self) -> list[Any]:
        return [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in self.versions.items()]

    def run_pip(self, *arguments: str, keep: dict[str, str], **_: Any) -> bool:
        self.calls.append(arguments)
        self.kept.append(list(keep.values()))
        return len(self.calls) > self.failing


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("install_missing", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = Environment(script)
    monkeypatch.setattr(metadata, "distributions", found.distributions)
    monkeypatch.setattr(script, "_pip", found.run_pip)
    monkeypatch.setattr(script, "_is_editable_here", lambda: True)
    return found


def test_pip_needs_no_index_where_nothing_is_missing(tmp_path: Path) -> None:
    """The real one, in an environment whose packages have names and versions alone."""
    site = tmp_path / "site"
    for name, version in (TESTED | {"torch": "2.14.0a0+git1", "setuptools": "80.9.0"}).items():
        place = site / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir(parents=True)
        place.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    editable = site / "gptkernels-1.dist-info"
    editable.mkdir()
    origin = {"url": ROOT.as_uri(), "dir_info": {"editable": True}}
    editable.joinpath("direct_url.json").write_text(json.dumps(origin))
    editable.joinpath("METADATA").write_text("Name: gptkernels\nVersion: 1\n")
    (site / "pip").symlink_to(Path(pip.__file__).parent)
    venv.create(tmp_path / "venv", symlinks=True)

    def run() -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": str(site), "PIP_INDEX_URL": (tmp_path / "nowhere").as_uri()}
        python = tmp_path / "venv" / "bin" / "python"
        return command(python, SCRIPT, env={**paths, "PIP_CONFIG_FILE": os.devnull})

    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shutil.rmtree(site / f"jinja2-{TESTED['jinja2']}.dist-info")
    done = run()
    assert done.returncode == 2
    assert "jinja2" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "pip could not add what is missing and keep what is there (see above); "
        "without PYTHON=... make uses a .venv of its own"
    )


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_what_is_missing_comes_as_it_was_tested_or_as_it_fits(
    failing: int, environment: Environment
) -> None:
    """And never in place of what is there."""
    del environment.versions["pytest-benchmark"]
    environment.versions |= {"torch": "2.12.1+cpu"}
    environment.failing = failing
    assert environment.script.main() == (2 if failing == 3 else 0)
    offline, *online = environment.calls
    assert offline[0] == "--no-index"
    assert online == [offline[2:]] * min(failing, 2)
    assert "pytest-benchmark>=5.1" in offline
    pins = f"pytest-benchmark=={TESTED['pytest-benchmark']}"
    assert [pins in kept for kept in environment.kept] == [False, True, False][: 1 + failing]
    for kept in environment.kept:
        assert [line for line in kept if line.startswith("torch=")] == ["torch==2.12.1+cpu"]
        assert not any(line.startswith("setuptools") for line in kept)


@pytest.mark.parametrize("nvcc", ["/usr/local/cuda/bin/nvcc", None])
def test_cuda_headers_come_where_there_is_no_toolkit(
    nvcc: str | None, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", {"nvcc": nvcc}.get)
    assert environment.script.main() == 0
    (wanted,) = environment.calls
    assert sum(text.startswith("nvidia-cuda-") for text in wanted) == (0 if nvcc else 3)


@pytest.mark.parametrize(
    ("torch", "triton"),
    [
        ("2.11.0+cpu", "triton==3.6.0"),
        ("2.12.1", "triton==3.7.1"),
        ("2.13.0", "triton==3.7.1"),
        ("2.14.0a0+git1234567", "triton==3.8.*"),
        ("2.15.2", "triton==3.9.*"),
        ("2.16.0", "triton"),
        (None, f'triton=={TESTED["triton"]}; sys_platform == "linux"'),
    ],
)
def test_triton_comes_in_the_version_of_the_torch_that_is_there(
    torch: str | None, triton: str, environment: Environment
) -> None:
    del environment.versions["torch"], environment.versions["triton"]
    if torch is not None:
        environment.versions["torch"] = torch
    environment.failing = 1
    assert environment.script.main() == 0
    assert [line for line in environment.kept[-1] if line.startswith("triton")] == [triton]


def test_the_package_itself_is_installed_with_the_setuptools_that_is_there(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.script, "_is_editable_here", lambda: False)
    assert environment.script.main() == 0
    assert environment.calls[1:] == [
        ("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("gpu", [False, True])
def test_make_compiles_kernels_for_a_gpu_that_is_here(tmp_path: Path, gpu: bool) -> None:
    """So that no test runs those of older sources."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *gpus.py) exit {1 - gpu};; esac\necho "$*"\n')
    python.chmod(0o755)
    made = ("make", "-s", "-f", ROOT / "Makefile", "test", "PYTHON=python", "JOBS=1")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = command(*made, cwd=tmp_path, env=environment, check=True)
    native = ["scripts/extension.py native --check", "setup.py --quiet build_ext --inplace"]
    assert [line for line in done.stdout.splitlines() if not line.startswith("-c ")] == [
        "scripts/install_missing.py",
        "scripts/cpu_extension.py --inplace",
        "scripts/extension.py emulator",
        *(native if gpu else []),
        "-m pytest -n 1",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["gpu", "gpu-tune"])
def test_make_gpu_without_a_gpu_says_so_and_builds_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    made = ("make", "-s", "-f", ROOT / "Makefile", target, f"PYTHON={sys.executable}")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = command(*made, cwd=tmp_path, env=environment)
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
    done = command("make", "-n", "gates", "PYTHON=python", f"ARGS={arguments}", check=True)
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
        made = ("make", "-s", "gpu", f"PYTHON={python}", "RESULTS=my results")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {"PATH": path, "TRITON_INTERPRET": "1", **given}
        done = command(*made, cwd=checkout, env=environment, check=True)
        arguments = ["-P", "-m", "benchmarks.gpu", "--results", "my results"]
        said = ["no nvcc", "going on without the CUDA C++ kernels"] if lacking else []
        assert done.stdout.splitlines() == [*said, expected, "unset", *arguments]
        module = checkout / "gptkernels" / "_cuda.so"
        assert (module.read_text() == "native") if not lacking else not module.exists()
