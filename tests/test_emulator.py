"""The emulator of the CUDA kernels, on small kernels of its own (tests/emulator_kernels): each
primitive against a case worked by hand, and for each detector a kernel with the mistake that it is
there to find, and the same kernel without."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import philox

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "tests" / "emulator_kernels"
HERE = f"{platform.machine()} {platform.system()}"
pytestmark = pytest.mark.skipif(
    HERE not in ("x86_64 Linux", "aarch64 Linux"),
    reason=f"the emulator runs on x86-64 and aarch64 Linux, and this is {HERE}",
)


class Case(ctypes.Structure):
    """As in tests/emulator_kernels/cases.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("broken", ctypes.c_int),
    )


class Emulator:
    """Runs one case at a time."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.run.argtypes = [
            *(ctypes.c_char_p, address, ctypes.c_uint, ctypes.c_uint, size),
            *(address, ctypes.c_char_p, size),
        ]

    def __call__(
        self,
        name: str,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        c_is: str = "inout",
        n: int = 0,
        broken: int = False,
        grid: tuple[int, int, int] = (1, 1, 1),
        cluster: int = 1,
        threads: int = 32,
        shared: int = 0,
    ) -> None:
        """a is an input, b an output, c what `c_is` says: in, out, or inout, updated in place.

        Raises RuntimeError with what the launch throws.
        """
        for tensor, key, kind in ((a, b"a", "in"), (b, b"b", "out"), (c, b"c", c_is)):
            for word, written in (("in", 1), ("out", 0)):
                if tensor is not None and word in kind:
                    self.declare(key, tensor, written)
        params = Case(*(t.data_ptr() if t is not None else 0 for t in (a, b, c)), n, int(broken))
        error = ctypes.create_string_buffer(4096)
        failed = self.library.run(
            *(name.encode(), (ctypes.c_uint * 3)(*grid), cluster, threads, shared),
            *(ctypes.byref(params), error, len(error)),
        )
        self.forget()
        if failed:
            raise RuntimeError(error.value.decode())

    def declare(self, name: bytes, tensor: Tensor, written: int) -> None:
        declare = self.library.declare
        declare.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        declare(name, tensor.data_ptr(), tensor.nbytes, written)

    def forget(self) -> None:
        self.library.forget()


class Gpu(Emulator):
    """The same cases as a GPU runs them; the tensors stay the caller's, on the CPU."""

    def __call__(
        self,
        name: str,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        **options: Any,
    ) -> None:
        there = {k: t.cuda() for k, t in {"a": a, "b": b, "c": c}.items() if t is not None}
        torch.cuda.synchronize()
        super().__call__(name, **there, **options)
        for here, key in ((a, "a"), (b, "b"), (c, "c")):
            if here is not None:
                here.copy_(there[key])

    def declare(self, name: bytes, tensor: Tensor, written: int) -> None:
        """A GPU is told of no bounds."""

    def forget(self) -> None:
        """Likewise."""


@pytest.fixture(scope="session")
def extension() -> ModuleType:
    """scripts/extension.py."""
    spec = importlib.util.spec_from_file_location("extension", ROOT / "scripts" / "extension.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sources(*stems: str) -> list[Path]:
    files = (path for path in KERNELS.iterdir() if path.suffix in (".cpp", ".cu"))
    return sorted(p.relative_to(ROOT) for p in files if not stems or p.stem in stems)


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
    chosen = sources(*stems, "wgmma_sm90", "mbarriers_sm90", "clusters_sm90")
    try:
        return Gpu(extension.native_library(chosen, ROOT / "build" / "native_kernels"))
    except extension.BuildError as error:
        pytest.skip(str(error))


def line(marker: str) -> str:
    """ "file:line" of the one line of the kernels that ends with the comment."""
    found = [
        f"tests/emulator_kernels/{path.name}:{number}"
        for path in KERNELS.glob("*.cu")
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if text.endswith(f"// {marker}")
    ]
    assert len(found) == 1, (marker, found)
    return found[0]


# ---- what the detectors say

N = 128
WARP: dict[str, Any] = {"a": 32, "b": 32, "n": 32, "shared": 128}
CTA: dict[str, Any] = {"a": N, "b": N, "n": N, "threads": N, "shared": 4 * N}
COPY: dict[str, Any] = {**CTA, "threads": N // 4}
THREAD = "CTA (0, 0, 0), thread #, at"
BARRIER = "tests/emulator_kernels/meetings.cu:#"
PRODUCT = "csrc/device/mma.h:#, called at csrc/device/mma.h:#"
LOAD, COPIES = "csrc/device/vector.h:#", "csrc/device/cp_async.h:#"

# name -> (how it is launched, what is said after the kernel's name). <marker> stands for a line of
# the kernels, # for any number.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    # Bounds
    "past_end": (
        WARP,
        "CTA (0, 0, 0), thread 31, at <past_end>: "
        "writes 4 bytes, 0 bytes past the end of b (128 bytes)",
    ),
    "before_start": (
        WARP,
        "CTA (0, 0, 0), thread 0, at <before_start>: "
        "reads 4 bytes, 4 bytes before the start of a (128 bytes)",
    ),
    "bf16_past_end": (
        {"c": 16, "c_is": "out"},
        "CTA (0, 0, 0), thread 31, at <bf16_past_end>, called at <bf16_past_end: caller>: "
        "writes 2 bytes, 0 bytes past the end of c (64 bytes)",
    ),
    "shared_past_end": (
        WARP,
        "CTA (0, 0, 0), thread 31, at <shared_past_end>: "
        "reads 4 bytes, 0 bytes past the end of shared memory (128 bytes)",
    ),
    "shared_before_start": (
        WARP,
        "CTA (0, 0, 0), thread 0, at <shared_before_start>: "
        "writes 4 bytes, 4 bytes before the start of shared memory (128 bytes)",
    ),
    "straddles_the_end": (
        {"b": 30, "threads": 8},
        "CTA (0, 0, 0), thread 7, at csrc/device/vector.h:#, called at <straddles_the_end>: "
        "writes 16 bytes, the last 8 past the end of b (120 bytes)",
    ),
    "null_pointer": (
        WARP,
        "CTA (0, 0, 0), thread 0, at <null_pointer>: reads 4 bytes, 0 bytes past a null pointer",
    ),
    "far_away": (
        WARP,
        "CTA (0, 0, 0), thread 0, at <far_away>: "
        "reads 4 bytes, far from every tensor of this call and from shared memory",
    ),
    "other_local_memory": (
        WARP,
        f"{THREAD} <other_local_memory>: reads 4 bytes, in local memory of thread 0",
    ),
    "copy_past_end": (
        COPY,
        f"CTA (0, 0, 0), thread 0, at {COPIES}, called at <copy_past_end>: "
        "reads 16 bytes, 0 bytes past the end of a (512 bytes)",
    ),
    # Alignment
    "misaligned_16": (
        {"a": 36, "b": 32, "threads": 8},
        f"CTA (0, 0, 0), thread 0, at {LOAD}, called at <misaligned_16>: "
        "reads 16 bytes at an address that is 4 past a multiple of 16",
    ),
    "misaligned_8": (
        {"a": 34, "b": 32, "threads": 16},
        "CTA (0, 0, 0), thread 0, at <misaligned_8>: "
        "reads 8 bytes at an address that is 4 past a multiple of 8",
    ),
    "copy_misaligned": (
        {**COPY, "a": N + 4},
        f"CTA (0, 0, 0), thread 0, at {COPIES}, called at <copy_misaligned>: "
        "cp.async reads at an address that is 4 past a multiple of 16",
    ),
    # Memory never written, and memory not to be written
    "shared_unwritten": (
        WARP,
        "CTA (0, 0, 0), thread 1, at <shared_unwritten>: "
        "reads 4 bytes at byte 4 of shared memory, which nobody has written",
    ),
    "global_unwritten": (
        {"b": 32},
        "CTA (0, 0, 0), thread 0, at <global_unwritten>: "
        "reads 4 bytes at byte 0 of b, which nobody has written",
    ),
    "atomic_unwritten": (
        {"b": 32},
        "CTA (0, 0, 0), thread 0, at <atomic_unwritten>: "
        "updates 4 bytes at byte 0 of b, which nobody has written",
    ),
    "write_to_input": (
        WARP,
        "CTA (0, 0, 0), thread 0, at <write_to_input>: "
        "writes 4 bytes at byte 0 of a, an input of the kernel",
    ),
    # Copies in flight
    "copy_without_wait": (
        COPY,
        f"{THREAD} {LOAD}, called at <give_next>, called at <copy_without_wait>: reads 16 bytes "
        "at byte # of shared memory, which a cp.async may still write: thread # wrote at "
        f"{COPIES}, called at <issued>, and that thread has not waited for the copy",
    ),
    "copy_without_commit": (
        COPY,
        f"{THREAD} {LOAD}, called at <give_next>, called at <copy_without_commit>: reads 16 bytes "
        "at byte # of shared memory, which a cp.async may still write: thread # wrote at "
        f"{COPIES}, called at <left open>, and that thread has not waited for the copy",
    ),
    "wait_short_by_one": (
        {**COPY, "threads": N // 8},
        f"CTA (0, 0, 0), thread 0, at {LOAD}, called at <wait_short_by_one>: reads 16 bytes at "
        f"byte 256 of shared memory, which a cp.async may still write: thread 0 wrote at {COPIES}, "
        "called at <second group>, and that thread has not waited for the copy",
    ),
    "write_into_copy": (
        COPY,
        "CTA (0, 0, 0), thread 0, at <write_into_copy>: writes 4 bytes at byte 4 of shared memory, "
        f"which a cp.async may still write: thread 0 wrote at {COPIES}, called at <written into>, "
        "and that thread has not waited for the copy",
    ),
    "copy_source_changed": (
        {"c": N, "b": N, "n": N, "shared": 4 * N},
        f"CTA (0, 0, 0), thread 0, at {COPIES}, called at <copy_source_changed>: the source of a "
        "cp.async has changed before it was waited for",
    ),
    "copy_without_barrier": (
        COPY,
        f"CTA (0, 0, 0), thread 1, at {LOAD}, called at <give_earlier>, called at "
        "<copy_without_barrier>: reads 16 bytes at byte 0 of shared memory, which thread 0 wrote "
        f"at {COPIES}, called at <without barrier>, with no barrier between",
    ),
    "copy_into_read": (
        COPY,
        f"{THREAD} {COPIES}, called at <copy_into_read>: writes 16 bytes at byte # of shared "
        f"memory, which thread # read at {LOAD}, called at <give_next>, called at <still reads>, "
        "with no barrier between",
    ),
    # Races
    "read_after_write": (
        CTA,
        "CTA (0, 0, 0), thread 1, at <read_after_write>: reads 4 bytes at byte 0 of shared memory, "
        "which thread 0 wrote at <wrote>, with no barrier between",
    ),
    "write_after_read": (
        CTA,
        f"{THREAD} <write_after_read>: writes 4 bytes at byte # of shared memory, "
        "which thread # read at <has read>, with no barrier between",
    ),
    "write_after_write": (
        CTA,
        "CTA (0, 0, 0), thread 1, at <write_after_write>: writes 4 bytes at byte 0 of shared "
        "memory, which thread 0 wrote at <write_after_write>, with no barrier between",
    ),
    "part_and_whole": (
        WARP,
        "CTA (0, 0, 0), thread 2, at <part_and_whole>: writes 4 bytes at byte 12 of shared memory, "
        "which thread 1 read at <part>, with no barrier between",
    ),
    "lanes": (
        WARP,
        f"{THREAD} <lanes>: reads 4 bytes at byte # of shared memory, which thread # wrote at "
        "<lane wrote>, with no barrier between",
    ),
    "warps": (
        {**WARP, "a": 64, "b": 64, "threads": 64, "shared": 256},
        f"{THREAD} <warps>: reads 4 bytes at byte # of shared memory, which "
        "thread # wrote at <warp wrote>, with no barrier between",
    ),
    "half_warp": (
        WARP,
        f"{THREAD} <half_warp>: reads 4 bytes at byte # of shared memory, which thread # wrote at "
        "<half wrote>, with no barrier between",
    ),
    "named_barrier": (
        CTA,
        f"{THREAD} <named_barrier>: reads 4 bytes at byte # of shared memory, which thread # wrote "
        "at <after arriving>, with no barrier between",
    ),
    "wrong_barrier": (
        CTA,
        f"{THREAD} <wrong_barrier>: reads 4 bytes at byte # of shared memory, which thread # wrote "
        "at <pair wrote>, with no barrier between",
    ),
    "chain": (
        {**CTA, "threads": 96},
        f"{THREAD} <chain>: reads 4 bytes at byte # of shared memory, which thread # wrote at "
        "<chain wrote>, with no barrier between",
    ),
    "reused_barrier": (
        CTA,
        f"{THREAD} <reused_barrier>: reads 4 bytes at byte # of shared memory, which thread # "
        "wrote at <before reuse>, with no barrier between",
    ),
    "two_readers": (
        {"b": 96, "c": 1, "threads": 96},
        "CTA (0, 0, 0), thread 0, at <two_readers>: writes 4 bytes at byte 0 of c, which thread # "
        "read at <second reader>, with no barrier between",
    ),
    "three_readers": (
        {"b": N, "c": 1, "threads": N},
        "CTA (0, 0, 0), thread 0, at <three_readers>: writes 4 bytes at byte 0 of c, which thread "
        "# read at <last reader>, with no barrier between",
    ),
    "ten_readers": (
        {"b": 320, "c": 1, "threads": 320},
        "CTA (0, 0, 0), thread 0, at <ten_readers>: writes 4 bytes at byte 0 of c, "
        "which thread # read at <tenth reader>, with no barrier between",
    ),
    "later_readers": (
        {"b": 32, "c": 1},
        "CTA (0, 0, 0), thread 0, at <later_readers>: writes 4 bytes at byte 0 of c, "
        "which thread # read at <later reader>, with no barrier between",
    ),
    "readers_of_line": (
        CTA,
        "CTA (0, 0, 0), thread 0, at <readers_of_line>: writes 4 bytes at byte 12 of shared "
        f"memory, which thread # read at {LOAD}, called at <last reader of line>, with no barrier "
        "between",
    ),
    "ctas": (
        {"c": 1, "grid": (2, 1, 1)},
        "CTA (1, 0, 0), thread 0, at <ctas>: reads 4 bytes at byte 0 of c, which thread 0 of CTA "
        "(0, 0, 0) wrote at <ctas>, with no barrier between",
    ),
    "atomic_and_plain": (
        {"b": 1, "c": 1, "threads": 64},
        "CTA (0, 0, 0), thread 0, at <atomic_and_plain>: reads 4 bytes at byte 0 of c, which "
        "thread # updated at <atomic>, with no barrier between",
    ),
    "atomic_of_ctas": (
        {"b": 2, "c": 1, "grid": (2, 1, 1), "threads": 1},
        "CTA (1, 0, 0), thread 0, at <atomic_of_ctas>: reads 4 bytes at byte 0 of c, which "
        "thread # updated at <last atomic>, with no barrier between",
    ),
    # Threads that do not meet
    "deadlock": (
        {"threads": 64},
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 32-63 wait in __syncthreads at "
        f"<deadlock: all>, threads 0-31 wait in barrier on barrier 1 at {BARRIER}, called at "
        "<deadlock: named>",
    ),
    "missing_lanes": (
        {},
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 16-31 wait in __shfl_xor_sync "
        "with mask 0xffffffff at <missing_lanes: high>, threads 0-15 wait in __syncthreads at "
        "<missing_lanes: low>",
    ),
    "divergent_shuffle": (
        {},
        f"{THREAD} <divergent_shuffle: high>: __shfl_xor_sync with mask 0xffffffff diverges: lanes "
        "0x0000ffff of the same warp are in __shfl_xor_sync with mask 0xffffffff at "
        "<divergent_shuffle: low>",
    ),
    "divergent_barrier": (
        {},
        f"{THREAD} <divergent_barrier: high>: __syncthreads diverges: lanes of the same warp wait "
        "at <divergent_barrier: low>",
    ),
    "wrong_mask": (
        {},
        "CTA (0, 0, 0), thread 31, at <wrong_mask>: __shfl_down_sync has mask 0x7fffffff, which "
        "leaves out lane 31, its own",
    ),
    "wrong_width": (
        {},
        f"{THREAD} <wrong_width>: __shfl_sync has width 12, which must be a power of two up to 32",
    ),
    "returned_lanes": (
        {},
        f"{THREAD} csrc/device/mma.h:#, called at csrc/device/mma.h:#, called at <returned_lanes>: "
        "mma.sync needs the whole warp, and lanes 0xc0000000 have "
        "returned",
    ),
    "wrong_barrier_number": (
        {},
        f"{THREAD} {BARRIER}, called at <wrong_barrier_number>: barrier names barrier 16, "
        "there are 16",
    ),
    "wrong_barrier_count": (
        {"threads": 64},
        f"{THREAD} {BARRIER}, called at <wrong_barrier_count>: barrier is for 40 threads, "
        "not a multiple of 32",
    ),
    "unequal_barrier_counts": (
        {"threads": 64},
        f"{THREAD} {BARRIER}, called at <unequal_barrier_counts>: barrier brings 96 threads to "
        "barrier 1, where others wait for 64",
    ),
    "divergent_load": (
        {"a": N, "b": 32, "shared": 4 * N},
        f"{THREAD} csrc/device/mma.h:#, called at <divergent_load: high>: ldmatrix with mask "
        "0xffffffff diverges: lanes 0x0000ffff of the same warp are in ldmatrix with mask "
        "0xffffffff at csrc/device/mma.h:#, called at <divergent_load: low>",
    ),
    "divergent_product": (
        {"b": 32},
        f"{THREAD} {PRODUCT}, called at <divergent_product: high>: mma.sync with mask 0xffffffff "
        "diverges: lanes 0x0000ffff of the same warp are in mma.sync with mask 0xffffffff at "
        f"{PRODUCT}, called at <divergent_product: low>",
    ),
    "half_warps": (
        {"threads": 64},
        f"{THREAD} {BARRIER}, called at <half_warps>: a wait on barrier 1, for 32 threads, needs "
        "whole warps, and lanes 0x00010000 have returned",
    ),
    "half_of_another": (
        {"threads": 64},
        f"{THREAD} {BARRIER}, called at <half_of_another>: the barrier is complete, and lanes "
        "0xffff0000 of warp 0 have not come, the others wait at "
        f"{BARRIER}, called at <half_of_another>",
    ),
    "returned_before_barrier": (
        {"threads": 64},
        f"{THREAD} {BARRIER}, called at <returned_before_barrier>: barrier on barrier 1, for 64 "
        "threads, needs whole warps, and lanes 0xffff0000 have returned",
    ),
    "arrives_twice": (
        {"threads": 64},
        f"{THREAD} <arrives_twice>: barrier_arrive comes again to barrier 1, which its first "
        "arrival has not completed",
    ),
    "arrives_for_nobody": (
        {},
        f"{THREAD} <arrives_for_nobody>: barrier_arrive does not say for how many threads",
    ),
}


def launched(arguments: dict[str, Any]) -> dict[str, Any]:
    """With a tensor of 0, 1, 2 ... for each length."""
    made = {
        key: torch.arange(value, dtype=torch.float32) if key in ("a", "b", "c") else value
        for key, value in arguments.items()
    }
    return made


def expected(name: str, sentence: str) -> str:
    pattern = re.escape(sentence).replace("\\#", "#").replace("#", "[0-9]+")
    pattern = re.sub(r"<(.+?)>", lambda found: re.escape(line(found[1].replace("\\", ""))), pattern)
    return f"{name} on a small case(?:, |: ){pattern}"


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(emulator: Emulator, name: str) -> None:
    arguments, sentence = BROKEN[name]
    emulator(name, **launched(arguments))
    with pytest.raises(RuntimeError) as error:
        emulator(name, broken=True, **launched(arguments))
    assert re.fullmatch(expected(name, sentence), str(error.value)), str(error.value)


UNSEEN = """
#include "launch.h"

struct Eight { float v[8]; };
struct Params { Eight* a; float* b; int n; };
__attribute__((noinline)) float first(Eight eight) { return eight.v[0]; }

__global__ void taken_kernel(const Params p) { p.b[threadIdx.x] = first(p.a[threadIdx.x]); }
__global__ void cleared_kernel(const Params p) { memset(p.b, 0, p.n); }
__global__ void fine_kernel(const Params p) {
    unsigned bits;
    memcpy(&bits, p.b, sizeof bits);
    p.a[0] = p.a[bits];
}

void launch(const Params& p) {
    for (auto kernel : {taken_kernel, cleared_kernel, fine_kernel}) gk::launch(kernel, {}, p);
}
"""


def test_what_the_emulator_would_not_see_does_not_compile(
    extension: ModuleType, tmp_path: Path
) -> None:
    source, compiled = tmp_path / "unseen.cu", tmp_path / "unseen.o"
    source.write_text(UNSEEN)
    try:
        command = extension._emulated(extension._compiler(), [source])[-1].command
    except extension.BuildError as error:
        pytest.skip(str(error))
    compiling = [sys.executable, "scripts/compile.py", "--tools", "", "--object", str(compiled)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GPTK")}
    compiling += [str(source), "--", *command]
    done = subprocess.run(compiling, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert not compiled.exists()
    heading, *unseen = done.stdout.splitlines()
    assert heading == f"{source}: the emulator would not see what these touch"
    functions = [statement.strip().split(":")[0] for statement in unseen]
    assert sorted(functions) == ["cleared_kernel", "taken_kernel"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"threads": 0}, "asks for 0 threads, a CTA has 1 to 1,024"),
        ({"threads": 1025}, "asks for 1025 threads, a CTA has 1 to 1,024"),
        ({"grid": (1, 65_536, 1)}, "asks for a grid of (1, 65536, 1)"),
        ({"grid": (0, 1, 1)}, "asks for a grid of (0, 1, 1)"),
        (
            {"shared": 99 * 1024 + 1},
            "asks for 101377 bytes of shared memory, a CTA has 101376",
        ),
    ],
)
def test_what_cannot_be_launched(
    emulator: Emulator, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"nothing on a small case {sentence}")):
        emulator("nothing", **arguments)


def test_a_failed_launch_leaves_the_next_one_alone(emulator: Emulator) -> None:
    arguments = launched(COPY)
    for broken in (True, False, True, False):
        if broken:
            with pytest.raises(RuntimeError, match="may still write"):
                emulator("copy_without_wait", broken=True, **arguments)
        else:
            emulator("copy_without_wait", **arguments)
            assert arguments["b"].equal(arguments["a"].roll(-4))


def test_what_one_launch_wrote_the_next_may_read(emulator: Emulator) -> None:
    """Launches are ordered, and tensors are forgotten after their call."""
    total = torch.zeros(1)
    for _ in range(2):
        emulator("ctas", c=total, grid=(2, 1, 1))
    assert total.item() == 4
    with pytest.raises(RuntimeError, match="which nobody has written"):
        emulator("ctas", c=total, c_is="out", grid=(1, 1, 1), broken=True)


# ---- primitives

LANES = torch.arange(32, dtype=torch.int32)


def test_shuffles(machine: Emulator) -> None:
    out = torch.full((12, 32), -1, dtype=torch.int32)
    machine("shuffles", c=out, c_is="out")
    out -= 100  # each lane brings its number + 100
    lanes = LANES.tolist()
    assert out[0].tolist() == [0, 1, 2, *range(29)]
    assert out[1].tolist() == [*range(3, 32), 29, 30, 31]
    assert out[2].tolist() == [i ^ 5 for i in lanes]
    assert out[3].tolist() == [9] * 32
    # In segments of 8 lanes
    up = [0, 1, 2, 0, 1, 2, 3, 4]
    down = [3, 4, 5, 6, 7, 5, 6, 7]
    assert out[4].tolist() == [i // 8 * 8 + up[i % 8] for i in lanes]
    assert out[5].tolist() == [i // 8 * 8 + down[i % 8] for i in lanes]
    # i ^ 12 leaves the segment upwards for lanes 0-7 and 16-23, which keep their own value; the
    # others read from an earlier segment, as shfl.bfly does.
    assert out[6].tolist() == [i if i // 8 % 2 == 0 else i ^ 12 for i in lanes]
    assert out[7].tolist() == [i // 8 * 8 + 1 for i in lanes]
    # Of 35, 2^32 - 1, 37 and -1 five bits count.
    assert out[8].tolist() == out[0].tolist()
    assert out[9].tolist() == [31, *range(1, 32)]
    assert out[10].tolist() == out[2].tolist()
    assert out[11].tolist() == [31] * 32


def test_votes(machine: Emulator) -> None:
    out = torch.full((6, 32), -1, dtype=torch.int32)
    machine("votes", c=out, c_is="out")
    thirds = 0b01001001001001001001001001001001
    assert out[0].tolist() == [thirds] * 32
    assert out[1].tolist() == [1] * 32
    assert out[2].tolist() == [0] * 32
    assert out[3].tolist() == [1] * 32
    assert out[4].tolist() == [1] * 16 + [0] * 16
    fifths = [1 << 0 | 1 << 5 | 1 << 10 | 1 << 15, 1 << 20 | 1 << 25 | 1 << 30]
    assert out[5].tolist() == [fifths[0]] * 16 + [fifths[1]] * 16


@pytest.mark.parametrize(("name", "threads"), [("turns", 32), ("turns_of_cta", 96)])
def test_barriers(machine: Emulator, name: str, threads: int) -> None:
    a, b = torch.arange(threads, dtype=torch.float32), torch.empty(threads)
    machine(name, a=a, b=b, n=5, threads=threads, shared=4 * threads)
    assert b.equal(a.roll(-5))


def test_named_barriers(emulator: Emulator) -> None:
    a, b = torch.arange(128, dtype=torch.float32), torch.empty(128)
    emulator("turns_of_pairs", a=a, b=b, n=5, threads=128, shared=512)
    assert b.view(2, 64).equal(a.view(2, 64).roll(-5, dims=1))


def test_arriving_at_a_barrier_without_waiting(emulator: Emulator) -> None:
    arguments = launched(CTA)
    emulator("named_barrier", **arguments)
    assert arguments["b"][64:].equal(arguments["a"][:64])


def test_atomics(machine: Emulator) -> None:
    ctas, threads = 3, 64
    found, sums = torch.empty(ctas * threads), torch.tensor([0.0, 2.0])
    machine("atomics", b=found, c=sums, grid=(ctas, 1, 1), threads=threads)
    numbers = range(ctas * threads)
    assert sums.tolist() == [len(numbers), 2 + sum(numbers)]
    assert sorted(found.tolist()) == list(numbers)  # each add finds what the one before it left


def test_indices(machine: Emulator) -> None:
    x, y, z, threads = 2, 3, 2, 40
    out = torch.empty(z, y, x, threads, 4, dtype=torch.int32)
    machine("indices", c=out, c_is="out", grid=(x, y, z), threads=threads)
    ranges = [torch.arange(size, dtype=torch.int32) for size in (z, y, x, threads)]
    k, j, i, t = torch.meshgrid(*ranges, indexing="ij")
    assert out.equal(torch.stack((i, j, k, t), dim=-1))


def test_ldmatrix(machine: Emulator) -> None:
    """Matrix m holds 1000 m + 10 row + col; a register's lower half comes first."""
    matrix, row, col = torch.meshgrid(
        torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij"
    )
    shared = (1000 * matrix + 10 * row + col).to(torch.int16)
    out = torch.empty(2, 4, 32, 2, dtype=torch.int16)
    machine("ldmatrix", c=shared, c_is="in", b=out, shared=512)
    plain, transposed = out.tolist()
    # By hand: lane 0 holds the start of row 0, lane 5 columns 2 and 3 of row 1, lane 31 the end of
    # row 7; transposed the same of columns.
    assert [plain[0][lane] for lane in (0, 5, 31)] == [[0, 1], [12, 13], [76, 77]]
    assert [transposed[0][lane] for lane in (0, 5, 31)] == [[0, 10], [21, 31], [67, 77]]
    for m in range(4):
        for lane in range(32):
            row, col = lane // 4, lane % 4 * 2
            at = 1000 * m
            assert plain[m][lane] == [at + 10 * row + col, at + 10 * row + col + 1]
            assert transposed[m][lane] == [at + 10 * col + row, at + 10 * (col + 1) + row]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(machine: Emulator, dtype: torch.dtype) -> None:
    """Small whole numbers, so that every sum is exact."""
    a = torch.randint(-8, 9, (16, 16)).to(dtype)
    b = torch.randint(-8, 9, (16, 8)).to(dtype)
    out = torch.empty(16, 8)
    name = "mma_bf16" if dtype == torch.bfloat16 else "mma_f16"
    machine(name, a=torch.cat((a.flatten(), b.flatten())), b=out)
    assert out.double().equal(1 + a.double() @ b.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_tiles(
    machine: Emulator, dtype: torch.dtype, aligned: bool, a_transposed: bool, b_transposed: bool
) -> None:
    """Every layout, parts of tiles, rows that no 16-byte access fits; sums that are exact."""
    name = {4: "tile_product_f32", 2: "tile_product_f16"}[dtype.itemsize]
    name = "tile_product_bf16" if dtype == torch.bfloat16 else name
    stride = 56 if aligned else 53
    for rows, cols, depth in ((32, 32, 48), (27, 31, 37), (1, 1, 1), (17, 8, 16)):
        a, b = torch.randint(-1, 2, (rows, depth)), torch.randint(-1, 2, (depth, cols))
        stored = [a.T if a_transposed else a, b if b_transposed else b.T]
        # Between the rows, and past them, what a product must not take in.
        buffers = torch.full((2, 48, stride), float("nan"))
        for buffer, matrix in zip(buffers, stored, strict=True):
            buffer[: matrix.shape[0], : matrix.shape[1]] = matrix
        where = torch.tensor([rows, cols, depth, 0, stride, 48 * stride, stride], dtype=torch.int32)
        out = torch.empty(2, 32, 32)
        options = a_transposed + 2 * b_transposed + 4 * aligned
        elements = 2 * 32 * 48
        machine(
            name,
            a=buffers.to(dtype),
            b=out,
            c=where,
            c_is="in",
            n=options,
            threads=64,
            shared=elements * dtype.itemsize,
        )
        want = torch.zeros(2, 32, 32)
        want[0, :rows, :cols] = (a @ b).float()
        first = torch.zeros(32, 32)
        first[: min(depth, 32), :cols] = b[:32]
        want[1] = want[0] @ first
        assert torch.equal(out, want)


def test_copies_fill_with_zeros(emulator: Emulator) -> None:
    """Of 16 bytes the first 0, 4, 8, 12 or 16 are copied, and what they miss need not exist."""
    floats = torch.arange(32) % 5
    a, b = torch.arange(1, N, dtype=torch.float32), torch.empty(N)  # one float short
    counts = (4 * floats).to(torch.int32)
    assert counts[-1] == 4
    emulator("copy_zero_fill", a=a, b=b, c=counts, c_is="in", n=N, shared=4 * N)
    valid = torch.arange(4) < floats[:, None]
    assert b.view(32, 4).equal(torch.where(valid, torch.arange(1.0, N + 1).view(32, 4), 0.0))


@pytest.mark.parametrize("when", ["late", "early"])
def test_when_copies_arrive(emulator: Emulator, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel looks before it waits, which the emulator is kept from seeing."""
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", when)
    a, b = torch.arange(1, N + 1, dtype=torch.float32), torch.empty(N // 4)
    emulator("copy_looked_at", a=a, b=b, n=N, shared=4 * N)
    assert b.equal(a[::4] if when == "early" else torch.zeros(N // 4))


@pytest.mark.parametrize(
    "setting",
    [
        *({"GPTKERNELS_EMULATE_SCHEDULE": order} for order in ("forward", "reverse", "1", "2")),
        *({"GPTKERNELS_EMULATE_COPIES": when} for when in ("late", "early")),
    ],
    ids=lambda setting: next(iter(setting.values())),
)
def test_schedules_give_the_same_and_find_the_same(
    emulator: Emulator, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    for name, arguments in (("copy_without_wait", COPY), ("read_after_write", CTA)):
        tensors = launched(arguments)
        emulator(name, **tensors)
        by = -4 if name == "copy_without_wait" else 1
        want = tensors["a"].roll(by)
        want[: max(by, 0)] = tensors["a"][0]
        assert tensors["b"].equal(want)
        with pytest.raises(RuntimeError, match=r"may still write|no barrier|nobody has written"):
            emulator(name, broken=True, **tensors)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SCHEDULE", "sideways", "must be forward, reverse or a number, got sideways"),
        ("COPIES", "never", "must be late or early, got never"),
    ],
)
def test_settings_that_are_none(
    emulator: Emulator,
    name: str,
    value: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"GPTKERNELS_EMULATE_{name}", value)
    with pytest.raises(RuntimeError, match=f"GPTKERNELS_EMULATE_{name} {sentence}"):
        emulator("nothing")


# ---- the dropout contract


@pytest.mark.parametrize("transposed", [False, True], ids=["queries as rows", "keys as rows"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_keep_bits_of_a_block_of_scores(machine: Emulator, transposed: bool, p: float) -> None:
    for query, key, batch_head in ((0, 0, 0), (32, 16, 4), (16, 144, 5)):
        rng = philox.draw("cpu")
        where = torch.tensor([*rng, query, key, batch_head])
        out = torch.empty(16, 16)
        threshold = philox.threshold(p)
        machine("attention_keep", b=out, c=where, c_is="in", n=threshold, broken=transposed)
        whole = philox.attention_keep(rng, p, 2, 3, query + 16, key + 16)
        want = whole[batch_head // 3, batch_head % 3, query:, key:]
        assert torch.equal(out.bool(), want.T if transposed else want)


@pytest.mark.parametrize("first", [0, 8, 3, 2**35 - 8, 2**35 + 5, 2**40 + 7])
def test_keep_bits_of_elements(machine: Emulator, first: int) -> None:
    """From the first element of a Philox call or from one between, past 32 bits of the counter."""
    rng, out = philox.draw("cpu"), torch.empty(32, 8)
    where = torch.tensor([*rng, first])
    machine("elementwise_keep", b=out, c=where, c_is="in", n=philox.threshold(0.4))
    group = torch.arange(first // 8, first // 8 + 33)
    lanes = philox._lanes(rng, group & 0xFFFFFFFF, group >> 32, torch.zeros_like(group))
    kept = lanes.view(-1) >= philox.threshold(0.4)
    assert torch.equal(out.bool().view(-1), kept[first % 8 :][:256])
