"""The CPU kernels' module: what it links, which instruction set runs, on which threads."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, command, threads

from gptkernels import attention, attention_decode, layer_norm
from gptkernels.core import compiled, cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable("cpu") is not None, reason=f"impl='cpu': {cpu.unavailable('cpu')}"
)
needs_objects = pytest.mark.skipif(
    not (ROOT / "build" / "cpu" / "objects").exists() or shutil.which("objdump") is None,
    reason="needs the objects of `make cpu`, and binutils",
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return command(sys.executable, "-c", code, env=os.environ | {"PYTHONPATH": path} | environment)


def objects() -> dict[str, list[Path]]:
    """Instruction set -> its objects."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "build" / "cpu" / "objects").glob("**/*.o")):
        source = re.fullmatch(r"\w+\.cpp(?:\.(\w+))?\.o", path.name)
        if source and source[1]:
            found.setdefault(source[1], []).append(path)
    return found


def test_links_no_torch_and_no_openmp() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    done = command("readelf", "-dW", cpu.module().__file__, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    allowed = r"lib(c|m|dl|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux-.+"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


@needs_objects
def test_no_instruction_set_shares_a_function_with_another() -> None:
    """The linker would keep one of them, and a CPU could meet instructions that it lacks."""
    owners: dict[str, set[str]] = {}
    for isa, paths in objects().items():
        for path in paths:
            for line in command("nm", path, check=True).stdout.splitlines():
                kind, name = line.split()[-2:]
                if kind in "WVTu":
                    owners.setdefault(name, set()).add(isa)
    assert owners
    assert {name: isas for name, isas in owners.items() if len(isas) > 1} == {}


@needs_objects
def test_what_runs_first_runs_on_any_cpu() -> None:
    """dispatch.cpp asks the CPU what it has."""
    for path in (ROOT / "build" / "cpu" / "objects").glob("**/dispatch.cpp.o"):
        code = command("objdump", "-d", "-r", "--no-show-raw-insn", path, check=True).stdout
        assert re.search(r"%[yz]mm", code) is None
        calls = re.findall(r"R_X86_64_P(?:LT|C)32\s+(\S+?)(?:-0x\w+)?$", code, re.MULTILINE)
        assert calls
        assert [name for name in calls if re.search(r"\dv[34]", name)] == []


@needs_objects
def test_instruction_sets_use_their_own_registers_alone() -> None:
    avx512 = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"
    for isa, forbidden in (("baseline", "%[yz]mm"), ("v3", avx512)):
        for path in objects().get(isa, []):
            code = command("objdump", "-d", "--no-show-raw-insn", path, check=True).stdout
            assert re.search(forbidden, code) is None, path.name


def test_the_highest_instruction_set_runs_unless_another_is_named() -> None:
    module = cpu.module()
    sets = module.instruction_sets()
    assert sets[0] == "baseline"
    code = "from gptkernels.core import cpu; print(cpu.module().instruction_set())"
    assert run(code, GPTKERNELS_CPU_ISA="").stdout.strip() == sets[-1]
    for isa in (*sets[:1], *sets[-2:-1]):
        assert run(code, GPTKERNELS_CPU_ISA=isa).stdout.strip() == isa


def test_an_instruction_set_that_is_not_there_is_one_sentence() -> None:
    code = (
        "import torch, gptkernels as g;"
        "x = torch.randn(2, 8); print(g.layer_norm(x, x[0]).shape);"
        "g.layer_norm(x, x[0], impl='cpu')"
    )
    done = run(code, GPTKERNELS_CPU_ISA="avx1024")
    assert done.stdout.strip() == "torch.Size([2, 8])"
    assert re.search(
        r"RuntimeError: impl='cpu': GPTKERNELS_CPU_ISA: the CPU kernels run here with the "
        r"instruction sets baseline.*, not with avx1024\n$",
        done.stderr,
    )


def test_a_module_of_another_python_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(compiled, "_PACKAGE", tmp_path)
    cpu._unavailable.cache_clear()
    try:
        reason = cpu.unavailable("cpu")
        assert reason is not None
        assert "built without CPU kernels, as one is where no C++ compiler is; with g++" in reason
        (tmp_path / "_cpu.cpython-399-x86_64-linux-gnu.so").touch()
        cpu._unavailable.cache_clear()
        reason = cpu.unavailable("cpu")
        assert reason is not None
        assert "for another Python (_cpu.cpython-399-x86_64-linux-gnu.so)" in reason
    finally:
        cpu._unavailable.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such library")
def test_the_threads_are_pytorchs() -> None:
    """Also in a process that has others: scikit-learn brings an OpenMP library of its own."""
    program = (
        "import torch; torch.ones(99999).sum(); own = open('/proc/self/maps').read()\n"
        "from gptkernels.core import cpu\n"
        "print(own); print(cpu.module().threads_library())"
    )
    alone = command(sys.executable, "-c", program, check=True).stdout.splitlines()
    files = {Path(line.split()[-1]) for line in alone[:-1] if ".so" in line}
    library = Path(alone[-1]).resolve()
    assert {f.resolve() for f in files if "libgomp" in f.name or "omp.so" in f.name} == {library}
    pytest.importorskip("sklearn.metrics")
    beside = command(sys.executable, "-c", f"import sklearn.metrics\n{program}", check=True)
    assert Path(beside.stdout.splitlines()[-1]).resolve() == library


def rows() -> list[torch.Tensor]:
    """Results of kernels with partial sums or scratch memory, enough for several threads."""
    torch.manual_seed(1)
    caches = (torch.randn(3, 900, 4, 40) for _ in range(2))
    lengths = torch.tensor([900, 0, 300], dtype=torch.int32)
    decoded = attention_decode(
        torch.randn(3, 2, 8, 40), *caches, lengths, return_lse=True, impl="cpu"
    )
    x, weight = torch.randn(600, 257), torch.randn(257)
    x.requires_grad_()
    weight.requires_grad_()
    y = layer_norm(x, weight, weight.detach(), dropout_p=0.1, impl="cpu")
    y.backward(torch.randn(600, 257))
    assert x.grad is not None
    assert weight.grad is not None
    attended = []
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(2, 300, 2, 20, dtype=dtype, requires_grad=True)
        out = attention(q, q, q, dropout_p=0.1, impl="cpu")
        out.backward(torch.randn_like(out))
        assert q.grad is not None
        attended += [out.detach().float(), q.grad.float()]
    return [y.detach(), x.grad, weight.grad, *attended, *decoded]


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for count in (1, 2, 3, 7, 64):
        with threads(count):
            found.append(rows())
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def _send(connection: Any) -> None:
    connection.send([x.numpy() for x in rows()])


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch forks on Linux")
def test_a_forked_child_computes_the_same() -> None:
    """The threads of the pool are the parent's: a child that waits for them waits forever."""
    with threads(4):
        wanted = rows()
        receiving, sending = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_send, args=(sending,))
        child.start()
        try:
            assert receiving.poll(60), "the child does not answer"
            found = [torch.from_numpy(x) for x in receiving.recv()]
        finally:
            child.kill()
            child.join()
    assert all(map(torch.equal, found, wanted))


def test_small_numbers_count_as_numbers_again_afterwards() -> None:
    """Kernels read and write denormal numbers as 0, and leave the caller's setting alone."""
    tiny = torch.full((4, 8), 1e-40)
    layer_norm(tiny, torch.ones(8), impl="cpu")
    assert (tiny * 0.5 > 0).all()
