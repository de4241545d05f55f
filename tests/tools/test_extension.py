"""How the CUDA kernels are built: architectures, what depends on what, the cache of objects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from harness import ROOT


@pytest.fixture
def ninja_build(extension: ModuleType) -> ModuleType:
    return sys.modules[extension.build.__module__]


@pytest.fixture
def gpus(extension: ModuleType) -> ModuleType:
    return extension.gpus


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "GPTKERNELS_OBJECT_CACHE"):
        monkeypatch.delenv(name, raising=False)


A80, A90 = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"
A87 = "-gencode=arch=compute_87,code=sm_87"
PTX90 = "-gencode=arch=compute_90,code=[sm_90,compute_90]"
PTX80 = "-gencode=arch=compute_80,code=[sm_80,compute_80]"


@pytest.mark.parametrize(
    ("ours", "torchs", "targets"),
    [
        (None, None, [PTX80, A90]),
        ("", "", [PTX80, A90]),
        ("80", None, [A80]),
        ("90a", "8.0", [A90]),
        ("80;90;90a", None, [A80, A90]),
        ("80;90+PTX;90a", None, [A80, PTX90]),
        (None, "8.0 9.0a", [A80, A90]),
        (None, "7.5;8.0+PTX, 9.0", [PTX80, A90]),
        (None, "Turing Ampere+Tegra Hopper", [A87, PTX90]),
        ("120+PTX", None, ["-gencode=arch=compute_120,code=[sm_120,compute_120]"]),
    ],
)
def test_architectures(
    ours: str | None,
    torchs: str | None,
    targets: list[str],
    extension: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("GPTKERNELS_CUDA_ARCHS", ours), ("TORCH_CUDA_ARCH_LIST", torchs)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert extension._targets(Path("csrc/gelu_mlp/products.cu")) == targets
    # Hopper's own instructions exist for 90a alone, whatever is asked for.
    hoppers = ["-gencode=arch=compute_90a,code=sm_90a"]
    assert extension._targets(Path("csrc/gelu_mlp/sm90/products.cu")) == hoppers
    assert extension._targets(Path("csrc/attention/fwd/sm90/launch.cu")) == hoppers


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GPTKERNELS_CUDA_ARCHS", "Hopper", "GPTKERNELS_CUDA_ARCHS names 'Hopper'"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 native", "TORCH_CUDA_ARCH_LIST names 'native'"),
        ("GPTKERNELS_CUDA_ARCHS", "75", r"\(75\) has no compute capability from 8\.0"),
        ("TORCH_CUDA_ARCH_LIST", "Volta;7.5", r"\(Volta;7\.5\) has no compute capability from 8"),
    ],
)
def test_architectures_that_cannot_be(
    name: str, value: str, sentence: str, gpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(gpus.BuildError, match=sentence):
        gpus.architectures()


def test_architectures_that_are_too_old_are_named(
    gpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus.left_out() is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1 Turing;8.0;9.0a+PTX")
    assert gpus.left_out() == (
        "6.1, 7.5 of TORCH_CUDA_ARCH_LIST left out: the CUDA kernels need compute capability 8.0"
    )


@pytest.mark.parametrize("says", ["GPU 0: NVIDIA H200 (UUID: GPU-1)", "No devices were found", ""])
def test_a_build_wants_a_gpu_or_a_list_of_them(
    says: str, gpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the driver has no files, and its program says something or is not there."""
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    if says:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{says}'\n")
        program.chmod(0o755)
    reason = None if "GPU 0" in says else "no NVIDIA GPU is visible here and GPTKERNELS_CUDA_ARCHS"
    assert str(gpus.unwanted()).startswith(str(reason))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpus.unwanted() is None
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    (tmp_path / "nvidiactl").touch()  # the driver alone
    assert str(gpus.unwanted()).startswith(str(reason))
    (tmp_path / "nvidia0").touch()
    assert gpus.unwanted() is None


def test_threads_of_nvcc_are_no_part_of_the_commands(
    ninja_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC_THREADS", "4")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert ninja_build._environment()["NVCC_APPEND_FLAGS"] == "-lineinfo --threads 4"


@pytest.mark.parametrize(("given", "jobs"), [("3", 3), ("", len(os.sched_getaffinity(0)))])
def test_jobs(
    given: str, jobs: int, ninja_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    assert ninja_build.jobs() == jobs


@pytest.mark.parametrize("given", ["0", "-1", "abc", "1.5"])
def test_jobs_that_cannot_be(
    given: str, ninja_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(ninja_build.BuildError, match=f"MAX_JOBS is .*, 1 or more, not '{given}'"):
        ninja_build.jobs()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that CUDA_HOME names, with what a build looks for in it."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.1\n")
    nvcc.chmod(0o755)
    (tmp_path / "include" / "crt").mkdir(parents=True)
    for header in ("cuda_runtime.h", "crt/host_defines.h"):
        (tmp_path / "include" / header).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def test_toolkit_of_cuda_home(
    toolkit: Path, extension: ModuleType, ninja_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build as it is handed to ninja."""
    monkeypatch.setattr(ninja_build, "find_ninja", lambda: "true")
    monkeypatch.setenv("NVCC_CCBIN", "/opt/another/g++")
    extension.native(folder=toolkit / "build")
    written = (toolkit / "build" / "build.ninja").read_text()
    assert f"compiler = {toolkit}/bin/nvcc -std=c++20" in written
    assert f"-isystem{toolkit}/include" in written
    assert re.search(r"tools = .*release 13\.0, V13\.0\.1\s+/opt/another/g\+\+'$", written, re.M)


def test_a_source_is_compiled_for_each_row_of_the_table(
    extension: ModuleType, ninja_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "csrc" / "instances.toml"
    table.parent.mkdir()
    table.write_text('["op/a.cu"]\nTYPE = ["bf16", "f16"]\nWIDTH = [64, 96]\n')
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    rows = list(extension._objects(Path("csrc/op/a.cu"), ["cc"], "1"))
    assert [o.name for o in rows] == [
        f"csrc/op/a.cu.{row}" for row in ("bf16.64", "bf16.96", "f16.64", "f16.96")
    ]
    assert rows[1].command == ["cc", "-DTYPE=bf16", "-DWIDTH=96"]
    (other,) = extension._objects(Path("csrc/op/b.cu"), ["cc"], "1")
    assert (other.name, other.command) == ("csrc/op/b.cu", ["cc"])
    library = ninja_build.Library(tmp_path / "_cuda.so", [*rows, other], ["cc"], [])
    assert library.named("csrc/op/a.cu") == [library.path(o) for o in rows]
    assert library.named("csrc/op/a.cu.f16.64") == [library.path(rows[2])]
    with pytest.raises(extension.BuildError, match=r"no csrc/op/a\.cu\.f32 among csrc/op/a"):
        library.named("csrc/op/a.cu.f32")


def test_the_table_names_sources() -> None:
    table = tomllib.loads((ROOT / "csrc" / "instances.toml").read_text())
    assert [name for name in table if not (ROOT / "csrc" / name).is_file()] == []


class TestWhatLacks:
    def test_nothing(self, toolkit: Path, extension: ModuleType) -> None:
        assert extension.lacks() is None
        assert extension.main(["native", "--check"]) == 0

    def test_new_enough_nvcc(
        self, toolkit: Path, extension: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        nvcc = toolkit / "bin" / "nvcc"
        nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.6, V12.6.85\n")
        sentence = f"the CUDA kernels need nvcc 12.8 or newer, {nvcc} is: "
        assert extension.lacks().startswith(sentence)
        assert extension.main(["native", "--check"]) == 2
        assert capsys.readouterr().out.startswith(sentence)

    def test_compiler(
        self, toolkit: Path, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler -O2")
        assert extension.lacks() == (
            "the CUDA kernels need a C++ compiler, and no-such-compiler is not on PATH"
        )


class TestObjectCache:
    """With a compiler that writes its source and counts."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        compiler = tmp_path / "compiler"
        compiler.write_text(
            '#!/bin/sh\n# FLAGS -c SOURCE -o OBJECT -MMD -MF DEPFILE\necho x >> "$COUNT"\n'
            'for last; do :; done\ncp "$3" "$5"\necho "$5: $3 csrc/used.h" > "$last"\n'
            'echo "a note"\nif [ "$1" = -fail ]; then exit 3; fi\n'
        )
        compiler.chmod(0o755)
        return self.copy(tmp_path / "one")

    def copy(self, folder: Path) -> Path:
        (folder / "csrc" / "device").mkdir(parents=True)
        (folder / "csrc" / "a.cu").write_text('  #  include "device/used.h"\nint a;\n')
        (folder / "csrc" / "device" / "used.h").write_text('#include "../also.h"\n')
        (folder / "csrc" / "also.h").touch()
        (folder / "csrc" / "unused.h").touch()
        return folder

    def compile(self, checkout: Path, made: str, *, flag: str = "-O3", tools: str = "1") -> int:
        """The exit code."""
        shared = checkout.parent
        command = [sys.executable, str(ROOT / "scripts" / "compile.py"), f"--tools={tools}"]
        command += [f"--object={made}", "csrc/a.cu", "--", str(shared / "compiler"), flag]
        cache = {"GPTKERNELS_OBJECT_CACHE": str(shared / "cache"), "COUNT": str(shared / "count")}
        return subprocess.run(command, cwd=checkout, env=os.environ | cache).returncode

    def count(self, checkout: Path) -> int:
        return len((checkout.parent / "count").read_text().splitlines())

    def test_another_checkout_takes_what_one_has_compiled(self, checkout: Path) -> None:
        assert self.compile(checkout, "build/a.o") == 0
        other = self.copy(checkout.parent / "other")
        assert self.compile(other, "elsewhere/b.o") == 0
        assert self.count(checkout) == 1
        made = other / "elsewhere" / "b.o"
        assert made.read_text() == (other / "csrc" / "a.cu").read_text()
        assert Path(f"{made}.d").read_text() == "elsewhere/b.o: csrc/a.cu csrc/used.h\n"
        log = Path(f"{made}.log").read_text()
        assert re.fullmatch(r"a note\ncompiled in \d+\.\d s of one core\n", log)

    def test_whatever_an_object_depends_on_makes_another(self, checkout: Path) -> None:
        def compiled(**options: str) -> bool:
            before = self.count(checkout)
            assert self.compile(checkout, "a.o", **options) == 0
            return self.count(checkout) > before

        self.compile(checkout, "a.o")
        assert not compiled()
        assert compiled(flag="-O2")
        assert compiled(tools="2")
        for name, counts in (("a.cu", 1), ("device/used.h", 1), ("also.h", 1), ("unused.h", 0)):
            with open(checkout / "csrc" / name, "a") as file:
                file.write("// changed\n")
            assert compiled() == counts, name

    def test_what_fails_is_not_kept(
        self, checkout: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for attempt in (1, 2):
            assert self.compile(checkout, "a.o", flag="-fail") == 3
            assert self.count(checkout) == attempt
        assert capfd.readouterr().out == 2 * "a note\n"


def test_the_compiler_runs_at_the_same_addresses(tmp_path: Path) -> None:
    if subprocess.run(["setarch", "--addr-no-randomize", "true"]).returncode:
        pytest.skip("this system does not let a program choose its addresses")
    compiler, source, made = tmp_path / "compiler", tmp_path / "a.cu", tmp_path / "a.o"
    compiler.write_text("#!/bin/sh\ncat /proc/self/personality\n")
    compiler.chmod(0o755)
    source.touch()
    command = [sys.executable, str(ROOT / "scripts" / "compile.py"), "--tools=1"]
    subprocess.run([*command, f"--object={made}", str(source), "--", str(compiler)], check=True)
    persona = Path(f"{made}.log").read_text().splitlines()[0]
    assert int(persona, 16) & 0x0040000  # ADDR_NO_RANDOMIZE
