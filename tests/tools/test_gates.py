from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
from harness import ROOT

from gates import __main__ as command
from gates import native, sass
from gates.__main__ import ARCHITECTURE_ASIDE
from gates.table import (
    NATIVE,
    SHARED_LIMITS,
    TRITON,
    Exemption,
    Key,
    Launch,
    Requirement,
    Resources,
    Table,
    build_violations,
    changes,
    load,
    save,
    violations,
)

EMULATOR = ROOT / "build" / "emulator" / f"_cuda{EXTENSION_SUFFIXES[0]}"
CLEAN = Resources(registers=128, spills=0, stack=0, shared=65536)
FOUND: dict[Key, Resources] = {("a", 80): CLEAN, ("a", 86): CLEAN, ("b", 90): CLEAN}


def table() -> Table:
    return Table({"3.7.1": dict(FOUND)})


def with_row(key: Key, **numbers: int) -> dict[Key, Resources]:
    return FOUND | {key: dataclasses.replace(CLEAN, **numbers)}


class TestRules:
    def test_equal_numbers_hold(self) -> None:
        assert violations("Triton", "3.7.1", FOUND, table()) == []

    @pytest.mark.parametrize("architecture", SHARED_LIMITS)
    def test_shared_memory_over_the_limit(self, architecture: int) -> None:
        """Even where the table has the same number."""
        limit = SHARED_LIMITS[architecture]
        for shared, broken in ((limit, 0), (limit + 1, 1)):
            found = with_row(("b", architecture), shared=shared)
            sentences = violations("Triton", "3.7.1", found, Table({"3.7.1": found}))
            assert len(sentences) == broken
        assert sentences == [
            f"b sm_{architecture}: {limit + 1} B of shared memory, {limit} B is the limit"
        ]

    @pytest.mark.parametrize("numbers", [{"spills": 3}, {"stack": 8}])
    def test_spills_need_an_exemption(self, numbers: dict[str, int]) -> None:
        found = with_row(("a", 86), **numbers)
        spilled = Table({"3.7.1": found})
        (sentence,) = violations("Triton", "3.7.1", found, spilled)
        assert sentence.startswith("a sm_86: spills registers without an exemption")
        spilled.exemptions = [Exemption("a", (80,), "another architecture")]
        assert len(violations("Triton", "3.7.1", found, spilled)) == 2
        spilled.exemptions = [Exemption("a", (80, 86), "ptxas spills two, which costs nothing")]
        assert violations("Triton", "3.7.1", found, spilled) == []
        spilled.exemptions = [Exemption("a", (86,), " ")]
        assert violations("Triton", "3.7.1", found, spilled) == ["a: its exemption gives no reason"]

    @pytest.mark.parametrize("numbers", [{"registers": 127}, {"registers": 129}, {"shared": 0}])
    def test_any_change_is_named(self, numbers: dict[str, int]) -> None:
        (sentence,) = violations("Triton", "3.7.1", with_row(("a", 80), **numbers), table())
        assert sentence.startswith("a sm_80: ")
        assert sentence.endswith("the table has 128 registers, 65536 B shared")

    def test_two_registers_may_differ_where_some_architectures_are_compiled(self) -> None:
        def broken(**numbers: int) -> int:
            found = {("a", 80): dataclasses.replace(CLEAN, **numbers)}
            return len(violations("Triton", "3.7.1", found, table(), architectures=[80]))

        assert [broken(registers=n) for n in (125, 126, 128, 130, 131)] == [1, 0, 0, 0, 1]
        assert broken(registers=127, shared=0) == 1

    def test_required_instructions(self) -> None:
        found = FOUND | {("b", 90): dataclasses.replace(CLEAN, instructions="HMMA LDG.128")}

        def broken(*requirements: Requirement, complete: bool = True) -> list[str]:
            table = Table({"13.0": found})
            return violations("nvcc", "13.0", found, table, requirements, complete=complete)

        assert broken(Requirement("b$", "HMMA"), Requirement("[bc]", "LDG.128")) == []
        assert broken(Requirement("b", "LDG")) == [
            "b sm_90: has no LDG (128 registers, 65536 B shared, HMMA LDG.128)"
        ]
        assert len(broken(Requirement("", "HMMA"))) == 2
        assert broken(Requirement("c", "HMMA")) == [
            "no kernel is named like 'c', which a requirement is for"
        ]
        assert broken(Requirement("c", "HMMA"), complete=False) == []

    def test_missing_and_stale_rows(self) -> None:
        new = with_row(("c", 80))
        assert violations("Triton", "3.7.1", new, table()) == [
            "c sm_80: not in the table (128 registers, 65536 B shared)"
        ]
        part = {("a", 80): CLEAN}
        assert violations("Triton", "3.7.1", part, table()) == [
            "a sm_86: in the table, but not shipped",
            "b sm_90: in the table, but not shipped",
        ]
        assert violations("Triton", "3.7.1", part, table(), complete=False) == []
        assert violations("Triton", "3.7.1", part, table(), architectures=[80]) == []
        assert violations("Triton", "3.7.1", part, table(), architectures=[80, 86]) == [
            "a sm_86: in the table, but not shipped"
        ]

    def test_unknown_version(self) -> None:
        (sentence,) = violations("Triton", "3.8.0", FOUND, table())
        assert sentence.startswith("the table has no Triton 3.8.0 (it has 3.7.1)")

    def test_changes(self) -> None:
        new = with_row(("a", 80), registers=100)
        del new["b", 90]
        new["c", 90] = CLEAN
        assert changes(FOUND, new) == [
            "- b sm_90: 128 registers, 65536 B shared",
            "+ c sm_90: 128 registers, 65536 B shared",
            "~ a sm_80: 128 registers, 65536 B shared -> 100 registers, 65536 B shared",
        ]


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "triton.json"
        versions = {"3.7.1": dict(FOUND), "3.6.0": with_row(("a", 80), stack=8)}
        written = Table(versions, [Exemption("a", (80,), "why")])
        save(written, path)
        assert load(path) == written
        assert "instructions" not in path.read_text()
        written.versions["3.7.1"]["a", 80] = dataclasses.replace(CLEAN, instructions="HMMA")
        written.versions["3.7.1"]["a", 86] = dataclasses.replace(CLEAN, roles="24 240")
        written.builds = {"op 0: 128x128": Launch(384, 200_000, 2, 2, 1)}
        save(written, path)
        assert load(path) == written
        assert '["registers", "spills", "stack", "shared", "instructions", "roles"]' in (
            path.read_text()
        )
        save(Table(), path)
        assert load(path) == Table()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": {"3": {"a": 1}}}'])
    def test_foreign_file(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "triton.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a table of the gates"):
            load(path)

    def test_committed_table_keeps_its_own_rules(self) -> None:
        committed = load(TRITON)
        assert {"3.6.0", "3.7.1", "3.9.0"} <= committed.versions.keys()
        whole = committed.versions["3.7.1"].keys()
        for version in ("3.6.0", "3.9.0"):
            aside = committed.versions[version].keys()
            assert aside <= whole
            assert {name.split()[0] for name, _ in aside} == {name.split()[0] for name, _ in whole}
            assert {architecture for _, architecture in aside} == {ARCHITECTURE_ASIDE}
        for version, rows in committed.versions.items():
            assert violations("Triton", version, rows, committed) == []

    def test_committed_table_has_what_is_shipped(self) -> None:
        """Of every architecture: a run may be told to compile for some alone."""
        version = pytest.importorskip("triton").__version__
        committed = load(TRITON)
        if version not in committed.versions:
            pytest.skip(f"the table has no Triton {version}")
        code = (
            "from gates.compiling import configurations\n"
            "for name, shipped in configurations().items():\n"
            "    for architecture in shipped.architectures: print(architecture, name)"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment["PYTHONPATH"] = str(ROOT)
        done = harness.command(sys.executable, "-c", code, env=environment, check=True)
        shipped = done.stdout.splitlines()
        assert sorted(shipped) == sorted(f"{a} {name}" for name, a in committed.versions[version])

    def test_committed_native_table_keeps_its_own_rules(self) -> None:
        committed = load(NATIVE)
        assert "13.0" in committed.versions
        for version, rows in committed.versions.items():
            assert {architecture for _, architecture in rows} == {80, 90}
            assert violations("nvcc", version, rows, committed, native.REQUIREMENTS) == []


class TestCommand:
    """In a copy with a cache and a table of its own, from a process that runs the interpreter."""

    ONLY = "gelu_mlp_fwd bf16 tanh 64x64x64"

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT))),
        }
        gates = ("-m", "gates", "--compiler", "triton", "--jobs", "1")
        return harness.command(sys.executable, *gates, *arguments, cwd=folder, env=environment)

    def test_compiles_and_compares(self, tmp_path: Path) -> None:
        version = pytest.importorskip("triton").__version__
        if version not in load(TRITON).versions:
            pytest.skip(f"the table has no Triton {version}")
        shutil.copytree(TRITON.parent, tmp_path / "gates", ignore=shutil.ignore_patterns("__py*"))
        path = tmp_path / "gates" / "triton.json"
        first = self.run(tmp_path, "--only", self.ONLY)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "4 compiled kernels, all hold" in first.stdout
        assert len(list((tmp_path / "build" / "gates").glob("*.json"))) == 4

        text = json.loads(path.read_text())
        text["versions"][version][self.ONLY]["sm_90"][0] += 1
        path.write_text(json.dumps(text))
        changed = self.run(tmp_path, "--only", self.ONLY)
        assert changed.returncode == 1
        assert f"FAILED {self.ONLY} sm_90: " in changed.stdout
        assert "1 FAILED" in changed.stdout
        others = self.run(tmp_path, "--only", self.ONLY, "--arch", "80", "86")
        assert others.returncode == 0, others.stdout + others.stderr
        assert "2 compiled kernels, all hold" in others.stdout

    def test_nothing_to_compile(self) -> None:
        pytest.importorskip("triton")
        none = self.run(ROOT, "--only", "no such kernel")
        assert none.returncode == 2
        assert "no configuration's name contains 'no such kernel'" in none.stderr

    def test_nothing_shipped_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("triton")
        monkeypatch.setattr(command, "_print", lambda *_: pytest.fail("there is nothing to print"))
        monkeypatch.setitem(
            sys.modules,
            "gates.compiling",
            SimpleNamespace(
                configurations=dict,
                measure_all=lambda keys, jobs: iter(()),
                one_of_each_kernel=lambda architecture: [],
            ),
        )
        options = command._parser().parse_args(["--update"])
        before = TRITON.read_bytes()
        assert command._triton(options) == 1
        assert TRITON.read_bytes() == before
        assert "no kernel was found" in capsys.readouterr().out

    @pytest.mark.parametrize("option", ["--triton", "--triton-path"])
    def test_nvcc_alone_and_versions_of_triton_exclude_each_other(
        self, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            command.main(["--compiler", "nvcc", option, "3.6.0"])
        assert stopped.value.code == 2
        assert "--compiler nvcc leaves it out" in capsys.readouterr().err


SASS = """
Fatbin elf code:
================
arch = sm_80
\t\tFunction : _ZN2gk6kernelIfEEvi
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
        /*0000*/                   LDG.E.128 R4, [R2.64] ;                 /* 0x0000000402047981 */
                                                                           /* 0x000fe8000c1e1d00 */
        /*0010*/             @!P0  STL.64 [R1], R4 ;                       /* 0x0000000402007986 */
        /*0020*/              @UP1 HMMA.16816.F32 R4, R4, R8, RZ ;         /* 0x0000000402007986 */
arch = sm_90a
\t\tFunction : _ZN2gk6kernelIfEEvi
        /*0000*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ; /* 0x000000f0000079c8 */
        /*0010*/             @P1   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;        /* 0x00000018000079c8 */
        /*0020*/                   UBLKRED.G.S.ADD.F32.RN [UR10], [UR6], UR4 ; /* 0x000a0600 */
        /*0030*/                   EXIT ;                                  /* 0x000000000000794d */
"""
USAGE = """
arch = sm_80
 Function _ZN2gk6kernelIfEEvi:
  REG:32 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _ZN2gk6kernelIfEEvi:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:540 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


class TestNative:
    """The CUDA C++ kernels' gates."""

    def test_reads_what_cuobjdump_prints(self, monkeypatch: pytest.MonkeyPatch) -> None:
        printed = {"-res-usage": USAGE, "-sass": SASS}
        monkeypatch.setattr(sass, "_cuobjdump", lambda option, file: printed[option])
        monkeypatch.setattr(native, "readable", lambda names: ["kernel<fp32>" for _ in names])
        assert native._read(Path()) == {
            ("kernel<fp32>", "80"): Resources(32, 1, 12, 16, "HMMA LDG.128"),
            ("kernel<fp32>", "90a"): Resources(40, 0, 0, 1024, "UBLKRED", "24 240"),
        }

    @pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
    def test_names_read_as_in_the_source(self) -> None:
        assert native.readable(
            [
                "_ZN2gk20attention_fwd_kernelI13__nv_bfloat16Li256ELb1EEEvNS_12FwdArgumentsE",
                "_ZN2gk14product_kernelIfNS_5SmallIfEELNS_6LayoutE2EEEvNS_7ProductE",
                "_ZN2gk12_GLOBAL__N_110sum_kernelI6__halfEEvi",
                "_ZN2gk5plainEi",
            ]
        ) == [
            "attention_fwd_kernel<bf16, 256, true>",
            "product_kernel<fp32, Small<fp32>, 2>",
            "sum_kernel<fp16>",
            "plain",
        ]

    @pytest.mark.parametrize("code", ["C7508", "C7511", "C7599"])
    def test_notes_of_ptxas_are_found(self, code: str) -> None:
        text = "ptxas info    : 0 bytes gmem\n" + 2 * f"ptxas info ({code}): setmaxnreg ignored\n"
        assert list(native.notes("a.cu", text)) == [
            f"a.cu: ptxas info ({code}): setmaxnreg ignored"
        ]

    def test_code_is_for_the_architectures_that_the_source_is_for(self) -> None:
        assert list(native.misplaced("sm90/a.cu", {"90a"})) == []
        assert list(native.misplaced("a.cu", {"80", "90"})) == []
        assert list(native.misplaced("sm90/a.cu", {"80", "90a"})) == [
            "sm90/a.cu: has code for sm_80, its folder says sm_90a alone"
        ]
        assert list(native.misplaced("a.cu", {"90a"})) == [
            "a.cu: has code for sm_90a, its folder says every GPU"
        ]

    def test_a_source_compiles_in_minutes(self) -> None:
        assert list(native.slow("a.cu", "ptxas\ncompiled in 180.0 s of one core\n")) == []
        assert list(native.slow("a.cu", "compiled in 180.1 s of one core\n")) == [
            "a.cu: took 180.1 s of one core to compile, 180 s is the limit"
        ]
        assert list(native.slow("a.cu", "ptxas\n")) == [
            "a.cu: nothing says how long it took to compile"
        ]

    def test_builds(self) -> None:
        most = SHARED_LIMITS[90]
        fits = Launch(threads=384, shared=most, stages=2, consumers=2, cluster=1)
        committed = Table(builds={"op 0: a": fits, "op 1: b": fits})
        assert build_violations({"op 0: a": fits, "op 1: b": fits}, committed) == []
        large = dataclasses.replace(fits, shared=most + 1)
        committed.builds["op 1: b"] = large
        found = {"op 0: a": dataclasses.replace(fits, stages=3), "op 1: b": large, "op 2: c": fits}
        assert build_violations(found, committed) == [
            f"op 1: b: {most + 1} B of dynamic shared memory, {most} B is the limit",
            f"op 0: a: {found['op 0: a']}, the table has {fits}",
            f"op 2: c: not among the table's builds ({fits})",
        ]
        assert build_violations({"op 0: a": fits}, committed) == [
            "op 1: b: a build of the table that is none"
        ]

    @pytest.mark.skipif(not EMULATOR.exists(), reason="the emulator is not built")
    def test_committed_builds_are_the_launchers(self) -> None:
        from gptkernels.core import native

        module = native.dry_run_module()
        names = [name for name in vars(module) if name.endswith("_builds")]
        found = {
            f"{name.removesuffix('_builds')} {index}: {one['name']}": one["shared_bytes"]
            for name in names
            for index, one in enumerate(getattr(module, name)())
        }
        committed = load(NATIVE).builds
        assert {name: launch.shared for name, launch in committed.items()} == found
        assert build_violations(committed, load(NATIVE)) == []

    def copy(self, folder: Path) -> None:
        for name in ("gates", "scripts"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__py*"))

    def run(
        self, folder: Path, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(folder)} | environment
        gates = ("-m", "gates", "--compiler", "nvcc", "--only", "spilling", *arguments)
        return harness.command(sys.executable, *gates, cwd=folder, env=environment)

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
    def test_spilling_kernel_fails(self, tmp_path: Path) -> None:
        (tmp_path / "csrc").mkdir()
        for name in ("bindings.cpp", "instances.toml"):
            (tmp_path / "csrc" / name).touch()
        (tmp_path / "csrc" / "spilling.cu").write_text(
            """
            __global__ void __launch_bounds__(1024, 2) spilling(float* p) {
                float values[64];
            #pragma unroll
                for (int i = 0; i < 64; ++i) values[i] = p[i * 1024 + threadIdx.x];
                __syncthreads();
            #pragma unroll
                for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = values[i] * values[63 - i];
            }
            """
        )
        version = native.version()
        assert version is not None
        self.copy(tmp_path)
        save(Table({version: {("spilling", 80): CLEAN}}), tmp_path / "gates" / "native.json")
        done = self.run(tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        for architecture in (80, 90):
            spills = f"spilling sm_{architecture}: spills registers without an exemption (32 regist"
            assert f"FAILED {spills}" in done.stdout
        assert "FAILED spilling sm_80: 32 registers" in done.stdout
        assert "FAILED spilling sm_90: not in the table" in done.stdout
        assert f"nvcc {version}: 2 compiled kernels, 4 FAILED" in done.stdout
        done = self.run(tmp_path, "--arch", "90")
        assert done.returncode == 1
        assert f"nvcc {version}: 1 compiled kernels, 2 FAILED" in done.stdout
        assert self.run(tmp_path, "--arch", "86").returncode == 2

    @pytest.mark.parametrize(("only", "code"), [("", 1), ("kernel", None)])
    def test_objects_without_kernels_fail(
        self,
        only: str,
        code: int | None,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(native, "version", lambda: "13.0")
        monkeypatch.setattr(native, "measure_all", lambda jobs, arch: ({}, ["a.cu: a note"]))
        assert command._nvcc(command._parser().parse_args(["--only", only])) == code
        said = capsys.readouterr().out
        assert ("FAILED a.cu: a note" in said) == (code == 1)
        assert ("no kernel was found" in said) == (code == 1)

    def test_without_sources_it_fails(self, tmp_path: Path) -> None:
        toolkit = tmp_path / "bin" / "nvcc"
        toolkit.parent.mkdir()
        toolkit.write_text("#!/bin/sh\necho release 13.0\n")
        toolkit.chmod(0o755)
        self.copy(tmp_path)
        done = self.run(tmp_path, CUDA_HOME=str(tmp_path))
        assert done.returncode == 2
        assert done.stderr == f"gates: there are no kernels in {tmp_path / 'csrc'}\n"

    def test_without_nvcc_it_is_skipped_and_says_so(self, tmp_path: Path) -> None:
        self.copy(tmp_path)
        done = self.run(tmp_path, PATH=str(tmp_path), CUDA_HOME="")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "nvcc: skipped, neither PATH nor CUDA_HOME leads to it\n"


def test_the_pinned_triton_is_in_the_table() -> None:
    """What the project pins must be what the gates check."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    (pin,) = (line for line in pinned if line.startswith("triton=="))
    version = pin.removeprefix("triton==").split(";")[0].strip()
    assert version in load(TRITON).versions
