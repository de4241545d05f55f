"""What is installed: sdist, wheel, an environment with nothing else in it, the declared extras."""

from __future__ import annotations

import ast
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ninja
import pytest
from harness import ROOT, command

from gptkernels.cli.installed import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
# Shared with `make gates`: what one of them compiled, the other copies.
OBJECT_CACHE = os.environ.get("GPTKERNELS_OBJECT_CACHE") or str(ROOT / "build" / "objects")


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in this environment without what would change Python, pip or the build, but with
    the architectures that nvcc compiles for: they are those of the objects that exist."""
    dropped = ("PYTHON", "PIP_", "GPTKERNELS_", "TORCH_CUDA", "CUDA_HOME", "NVCC_", "CXX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    if "GPTKERNELS_CUDA_ARCHS" in os.environ:
        kept["GPTKERNELS_CUDA_ARCHS"] = os.environ["GPTKERNELS_CUDA_ARCHS"]
    # Compiling every kernel takes a while.
    return command(*words, cwd=cwd, env=kept | environment, timeout=900)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the standard library alone: no torch, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `build-system.requires` names, and nothing else."""
    folder = tmp_path_factory.mktemp("backend")
    for requirement in PROJECT["build-system"]["requires"]:
        copy_distribution(re.split(r"[<>=!~ ]", requirement)[0], folder)
    program = shutil.which("ninja", path=os.pathsep.join((ninja.BIN_DIR, os.environ["PATH"])))
    assert program is not None
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "ninja").symlink_to(program)
    return folder


@dataclass
class FrontEnd:
    """Calls the build backend as an isolated build does: the bare Python sees what the build
    requires and nothing else; only that comes from this environment instead of the network.
    """

    python: Path
    backend: Path

    def call(
        self,
        hook: str,
        source: Path,
        folder: Path,
        *,
        nvcc: bool = False,
        choice: str = "auto",
        cpu: str = "0",
    ) -> subprocess.CompletedProcess[str]:
        code = f"from setuptools import build_meta as b; print(b.{hook}({str(folder)!r}))"
        path = [str(self.backend / "bin"), *([os.environ["PATH"]] if nvcc else [])]
        return run(
            self.python,
            "-c",
            code,
            cwd=source,
            PYTHONPATH=str(self.backend),
            PATH=os.pathsep.join(path),
            GPTKERNELS_BUILD_CPU=cpu,
            GPTKERNELS_BUILD_CUDA=choice,
            GPTKERNELS_OBJECT_CACHE=OBJECT_CACHE,
        )

    def build(self, hook: str, source: Path, folder: Path, **options: Any) -> Path:
        """The archive that the hook makes in `folder`."""
        done = self.call(hook, source, folder, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def front_end(bare: Path, backend: Path) -> FrontEnd:
    return FrontEnd(bare, backend)


@pytest.fixture(scope="module")
def sdist(front_end: FrontEnd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "gptkernels"
    copy_checkout(source)
    return front_end.build("build_sdist", source, tmp_path_factory.mktemp("dist"))


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    """The sdist's content, in a folder of the test's own."""
    return unpack(sdist, tmp_path / "unpacked")


@pytest.fixture(scope="module")
def pure_build(
    sdist: Path, front_end: FrontEnd, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The wheel built from the sdist where there is no nvcc, and what the build complained of."""
    folder = tmp_path_factory.mktemp("wheel")
    done = front_end.call("build_wheel", unpack(sdist, folder / "unpacked"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def wheel(pure_build: tuple[Path, str]) -> Path:
    return pure_build[0]


@pytest.fixture(scope="module")
def native_wheel(
    sdist: Path, front_end: FrontEnd, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built from the sdist where there is nvcc, once for all workers: it takes half a minute."""
    folder = tmp_path_factory.mktemp("native")
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "native"
        folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = list(folder.glob("*.whl"))
        if built:
            return built[0]
        source = unpack(sdist, folder / "unpacked")
        return front_end.build("build_wheel", source, folder, nvcc=True, choice="1")


def gpu_here() -> bool:
    script = [sys.executable, ROOT / "scripts" / "gpus.py"]
    return subprocess.run(script, check=False).returncode == 0


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


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


def test_isolated_build_sees_no_torch(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-c", "import torch", cwd=tmp_path)
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for expected in (
        "gptkernels/__init__.py",
        "gptkernels/py.typed",
        "gptkernels/ops/layer_norm/op.py",
        "gptkernels/ops/layer_norm/triton/launch.py",
        "gptkernels/gpt/model.py",
        "gptkernels/bench/timing.py",
        "gptkernels/bench/cases/layer_norm.py",
        "gptkernels/truth/plain_gpt.py",
    ):
        assert expected in names
    packages = [
        name for name in names if name.endswith(".py") and not name.startswith("gptkernels/")
    ]
    assert packages == []
    assert not [name for name in names if "tests/" in name or name.endswith((".so", ".pyc"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_every_module_of_the_checkout(wheel: Path) -> None:
    """A package that pyproject.toml forgets to list would be missing."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gptkernels").rglob("*.py")}
    assert modules <= names


def test_template_files_are_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gptkernels").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    ]
    assert set(data) <= names


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    text = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert re.search(r"^Requires-Dist: torch>=2\.11$", text, re.M)
    assert re.search(r"^Requires-Dist: triton<3\.10,>=3\.6; sys_platform == .linux.$", text, re.M)


def test_sdist_can_build_and_test_everything(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [
        path
        for folder in ("csrc", "gates", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    for expected in (
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "scripts/compile.py",
        "scripts/cpu_extension.py",
        "scripts/extension.py",
        "scripts/gpus.py",
        "scripts/install_missing.py",
        "scripts/ninja_build.py",
    ):
        assert expected in names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as an installer lays it out."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_without_nvcc_the_wheel_is_pure_python(pure_build: tuple[Path, str]) -> None:
    wheel, complaints = pure_build
    assert wheel.name.endswith("-py3-none-any.whl")
    sentence = "gptkernels is built without its CUDA kernels: neither PATH nor CUDA_HOME leads to"
    assert complaints.count(sentence) == 1


def test_with_an_old_nvcc_the_wheel_is_pure_python(
    unpacked: Path, front_end: FrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = front_end.call("build_wheel", unpacked, tmp_path, nvcc=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("-py3-none-any.whl")
    sentence = "built without its CUDA kernels: the CUDA kernels need nvcc 12.8 or newer, "
    assert done.stderr.count(sentence) == 1


@needs_nvcc
@pytest.mark.parametrize(
    ("choice", "reason"),
    [("0", "GPTKERNELS_BUILD_CUDA is 0"), ("auto", "no NVIDIA GPU is visible here and GPTKERNELS")],
)
def test_kernels_can_be_left_out(
    choice: str,
    reason: str,
    unpacked: Path,
    front_end: FrontEnd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Because they are not wanted, or because nothing here would run them."""
    if choice == "auto" and gpu_here():
        pytest.skip("a GPU is here")
    monkeypatch.delenv("GPTKERNELS_CUDA_ARCHS", raising=False)
    done = front_end.call("build_wheel", unpacked, tmp_path, nvcc=True, choice=choice)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("-py3-none-any.whl")
    assert f"built without its CUDA kernels: {reason}" in done.stderr


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("1", "GPTKERNELS_BUILD_CUDA is 1, but neither PATH nor CUDA_HOME leads to nvcc"),
        ("2", "GPTKERNELS_BUILD_CUDA is auto, 1 or 0, not '2'"),
    ],
)
def test_build_that_cannot_be_had_fails(
    choice: str, sentence: str, unpacked: Path, front_end: FrontEnd, tmp_path: Path
) -> None:
    done = front_end.call("build_wheel", unpacked, tmp_path, choice=choice)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].removeprefix("error: ") == sentence
    assert not list(tmp_path.glob("*.whl"))


@needs_nvcc
def test_a_wrong_list_of_gpus_is_no_reason_to_go_without(
    unpacked: Path, front_end: FrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_CUDA_ARCHS", "8O;9O")
    done = front_end.call("build_wheel", unpacked, tmp_path, nvcc=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("GPTKERNELS_CUDA_ARCHS names '8O'; architec")


def test_wheels_are_built_for_the_pythons_that_are_declared() -> None:
    tags = re.findall(r"cp3(\d+)-manylinux_\*", PROJECT["tool"]["cibuildwheel"]["build"])
    declared = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert tags == declared


def test_without_a_compiler_there_are_no_cpu_kernels(
    unpacked: Path, front_end: FrontEnd, tmp_path: Path
) -> None:
    done = front_end.call("build_wheel", unpacked, tmp_path, cpu="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("-py3-none-any.whl")
    reason = "the CPU kernels need a C++ compiler, and g++ or clang++ is not on PATH"
    assert f"gptkernels is built without its CPU kernels: {reason}" in done.stderr
    done = front_end.call("build_wheel", unpacked, tmp_path / "other", cpu="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"error: GPTKERNELS_BUILD_CPU is 1, but {reason}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on PATH")
def test_a_wheel_with_cpu_kernels_runs_without_torch(
    sdist: Path, front_end: FrontEnd, bare: Path, tmp_path: Path
) -> None:
    source = unpack(sdist, tmp_path / "unpacked")
    options = dict(nvcc=True, choice="0", cpu="1")  # with what is on PATH
    done = front_end.call("build_wheel", source, tmp_path, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    said, name = done.stdout.splitlines(), done.stdout.splitlines()[-1]
    (first,) = (at for at, line in enumerate(said) if line.startswith("compiling the CPU kernels"))
    (last,) = (
        at for at, line in enumerate(said) if re.match(r"compiled (\d+) of \1: build/", line)
    )
    assert last > first
    made = tmp_path / name
    module = f"gptkernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert module in zipfile.ZipFile(made).namelist()
    zipfile.ZipFile(made).extractall(tmp_path / "installed")
    code = "from gptkernels import _cpu; print(_cpu.compiled_for, _cpu.threads_library())"
    done = run(bare, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.stderr == ""
    assert done.stdout.startswith("baseline")
    assert f"compiling the CPU kernels for {done.stdout.strip()}: about" in said[first]


@pytest.fixture(scope="module")
def module(native_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module, where an installer puts it."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(native_wheel).extractall(folder)
    (module,) = folder.joinpath("gptkernels").glob("_cuda*")
    return module


@needs_nvcc
@pytest.mark.skipif(
    not (ROOT / "build" / "gates-native").exists(),
    reason="compiling all kernels takes minutes: `make gates` first, whose objects these take",
)
class TestKernels:
    """Builds with nvcc. `.ci/run` runs the gates before the tests."""

    def test_wheel_has_the_compiled_module_and_nothing_else_more(
        self, native_wheel: Path, wheel: Path
    ) -> None:
        assert native_wheel.name.endswith(f"_{platform.machine()}.whl")
        pure, native = (
            {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
            for path in (wheel, native_wheel)
        )
        assert native - pure == {f"gptkernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"}
        assert pure - native == set()

    def test_links_the_language_runtime_alone(self, module: Path, tmp_path: Path) -> None:
        """No libtorch, no libcudart, no libcuda: it loads beside any PyTorch, and with none."""
        dynamic = run("readelf", "-dW", module, cwd=tmp_path).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert needed >= {"libc.so.6"}
        allowed = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux-.+"
        assert [name for name in needed if not re.fullmatch(allowed, name)] == []
        assert "RUNPATH" not in dynamic
        assert "RPATH" not in dynamic

    def test_exports_what_python_calls(self, module: Path, tmp_path: Path) -> None:
        """A second copy of the CUDA runtime must not be seen by the rest of the process."""
        symbols = run("readelf", "--dyn-syms", "-W", module, cwd=tmp_path).stdout
        defined = [line.split()[-1] for line in symbols.splitlines()[3:] if " UND " not in line]
        assert defined == ["PyInit__cuda"]

    def test_editable_install_compiles_what_changed(
        self, unpacked: Path, front_end: FrontEnd, tmp_path: Path
    ) -> None:
        def compiled() -> list[str]:
            done = front_end.call("build_editable", unpacked, tmp_path, nvcc=True, choice="1")
            assert done.returncode == 0, done.stdout + done.stderr
            return re.findall(r"^compiled \d+ of \d+: (csrc/\S+)$", done.stdout, re.M)

        def sources(objects: list[str]) -> set[str]:
            return {re.sub(r"(\.c\w+)\..+", r"\1", name) for name in objects}

        every = {
            path.relative_to(unpacked).as_posix()
            for path in unpacked.glob("csrc/**/*.c*")
            if not {"cpu", "emulator"} & set(path.parts)
        }
        assert sources(compiled()) == every
        assert list(unpacked.joinpath("gptkernels").glob("_cuda*.so"))
        assert compiled() == []
        products = "csrc/gelu_mlp/sm90/products.cu"
        os.utime(unpacked / products)
        rows = ("forward", "backward", "weight")
        assert sorted(compiled()) == sorted(f"{products}.{layout}" for layout in rows)
        os.utime(unpacked / "csrc" / "runtime" / "launch.h")
        assert sources(compiled()) == every

    def test_pip_installs(self, unpacked: Path, tmp_path: Path) -> None:
        if importlib.util.find_spec("pip") is None:
            pytest.skip("needs pip")
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "to"]
        done = run(
            *(sys.executable, "-m", "pip", "install", *options, "."),
            cwd=unpacked,
            GPTKERNELS_BUILD_CUDA="1",
            GPTKERNELS_OBJECT_CACHE=OBJECT_CACHE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert list((tmp_path / "to" / "gptkernels").glob("_cuda*.so"))

    def test_without_a_driver_it_imports_and_a_launch_says_what_fails(
        self, module: Path, bare: Path, tmp_path: Path
    ) -> None:
        code = """
from gptkernels import _cuda
assert not _cuda.emulated
values = dict(rows=3, cols=64, eps=1e-5, build=-1, x_stride=64, residual_stride=64)
fields = _cuda.fields["layer_norm_fwd"]
try:
    _cuda.layer_norm_fwd(0, 0, *(values.get(field, 0) for field in fields))
except RuntimeError as error:
    print(error)
"""
        environment = {"PYTHONPATH": str(module.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
        done = run(bare, "-c", code, cwd=tmp_path, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        # The thread needs a context of the device before anything else: with no driver it cannot
        # ask for one, and a driver without a GPU has none.
        failed = "the driver could not be asked for its functions|device 0 cannot be used"
        assert re.fullmatch(rf"({failed}): .+\n", done.stdout)


def test_bare_environment_imports(bare: Path, installed: Path, tmp_path: Path) -> None:
    done = run(
        bare,
        "-c",
        "import gptkernels as g; print(g.__version__)",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert done.stderr == ""
    assert done.stdout.strip() == version()


def test_bare_environment_info_says_what_is_missing(
    bare: Path, installed: Path, tmp_path: Path
) -> None:
    done = run(bare, "-m", "gptkernels", "info", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (done.returncode, done.stderr) == (0, "")
    assert "PyTorch     missing: pip install torch" in done.stdout
    for extra in EXTRAS:
        assert f"pip install 'gptkernels[{extra}]'" in done.stdout


@pytest.mark.parametrize("command", ["verify", "demo", "train", "generate", "bench"])
def test_bare_environment_other_commands_name_their_extra(
    command: str, bare: Path, installed: Path, tmp_path: Path
) -> None:
    done = run(bare, "-m", "gptkernels", command, cwd=tmp_path, PYTHONPATH=str(installed))
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
from gptkernels.core.choice import unavailable
print(unavailable("triton", "cpu", torch.float32))
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
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
