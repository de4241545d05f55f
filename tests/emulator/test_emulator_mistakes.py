"""For each detector of the emulator a kernel with the mistake that it is there to find, and the
same kernel without; what does not compile for it, and what cannot be launched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated import COPY, CTA, THREAD, WARP, Machine, N, assert_named, launched
from harness import ROOT

FIRST = "CTA (0, 0, 0), thread 0, at"
BARRIER = "tests/emulator/kernels/meetings.cu:#"
PRODUCT = "csrc/device/mma.h:#, called at csrc/device/mma.h:#"
LOAD, COPIES = "csrc/device/vector.h:#", "csrc/device/cp_async.h:#"
COPIED = f"{COPIES}, called at <start_copy>"

TWO_WARPS = {"threads": 64}
# How those kernels are launched that WARP does not do for.
LAUNCHES: dict[str, dict[str, Any]] = {
    "bf16_past_end": {"c": 16, "c_is": "out"},
    "straddles_the_end": {"b": 30, "threads": 8},
    "copy_past_end": COPY,
    "misaligned_16": {"a": 36, "b": 32, "threads": 8},
    "misaligned_8": {"a": 34, "b": 32, "threads": 16},
    "copy_misaligned": {**COPY, "a": N + 4},
    "copy_without_wait": COPY,
    "copy_without_commit": COPY,
    "wait_short_by_one": {**COPY, "threads": N // 8},
    "write_into_copy": COPY,
    "copy_source_changed": {"c": N, "b": N, "n": N, "shared": 4 * N},
    "copy_without_barrier": COPY,
    "copy_into_read": COPY,
    "read_after_write": CTA,
    "write_after_read": CTA,
    "write_after_write": CTA,
    "warps": {**WARP, "a": 64, "b": 64, "threads": 64, "shared": 256},
    "named_barrier": CTA,
    "wrong_barrier": CTA,
    "chain": {**CTA, "threads": 96},
    "reused_barrier": CTA,
    "two_readers": {"b": 96, "c": 1, "threads": 96},
    "three_readers": {"b": N, "c": 1, "threads": N},
    "ten_readers": {"b": 320, "c": 1, "threads": 320},
    "later_readers": {"b": 32, "c": 1},
    "readers_of_line": CTA,
    "ctas": {"c": 1, "grid": (2, 1, 1)},
    "atomic_and_plain": {"b": 1, "c": 1, "threads": 64},
    "atomic_of_ctas": {"b": 2, "c": 1, "grid": (2, 1, 1), "threads": 1},
    "deadlock": TWO_WARPS,
    "wrong_barrier_count": TWO_WARPS,
    "unequal_barrier_counts": TWO_WARPS,
    "divergent_load": {**WARP, "a": N, "shared": 4 * N},
    "half_warps": TWO_WARPS,
    "half_of_another": TWO_WARPS,
    "returned_before_barrier": TWO_WARPS,
    "arrives_twice": TWO_WARPS,
}


def race(access: str, earlier: str) -> str:
    """What one thread does to shared memory, and what another has done."""
    where = "at byte # of shared memory"
    return f"{THREAD} {access} {where}, which thread # {earlier}, with no barrier between"


# name -> what is said after the kernel's name. <marker> stands for a line of the kernels, # for any
# number.
BROKEN: dict[str, str] = {
    # Bounds
    "past_end": (
        "CTA (0, 0, 0), thread 31, at <past_end>: writes 4 bytes, 0 bytes past the end of b (128 "
        "bytes)"
    ),
    "before_start": (
        f"{FIRST} <before_start>: reads 4 bytes, 4 bytes before the start of a (128 bytes)"
    ),
    "bf16_past_end": (
        "CTA (0, 0, 0), thread 31, at <bf16_past_end>, called at <bf16_past_end: caller>: writes 2 "
        "bytes, 0 bytes past the end of c (64 bytes)"
    ),
    "shared_past_end": (
        "CTA (0, 0, 0), thread 31, at <shared_past_end>: reads 4 bytes, 0 bytes past the end of "
        "shared memory (128 bytes)"
    ),
    "shared_before_start": (
        f"{FIRST} <shared_before_start>: writes 4 bytes, 4 bytes before the start of shared memory "
        "(128 bytes)"
    ),
    "straddles_the_end": (
        "CTA (0, 0, 0), thread 7, at csrc/device/vector.h:#, called at <straddles_the_end>: writes "
        "16 bytes, the last 8 past the end of b (120 bytes)"
    ),
    "null_pointer": f"{FIRST} <null_pointer>: reads 4 bytes, 0 bytes past a null pointer",
    "far_away": (
        f"{FIRST} <far_away>: reads 4 bytes, far from every tensor of this call and from shared "
        "memory"
    ),
    "other_local_memory": (
        f"{THREAD} <other_local_memory>: reads 4 bytes, in local memory of thread 0"
    ),
    "copy_past_end": (
        f"{FIRST} {COPIED}, called at <copy_past_end>: reads 16 bytes, 0 bytes past the end of a "
        "(512 bytes)"
    ),
    # Alignment
    "misaligned_16": (
        f"{FIRST} {LOAD}, called at <misaligned_16>: reads 16 bytes at an address that is 4 past a "
        "multiple of 16"
    ),
    "misaligned_8": (
        f"{FIRST} <misaligned_8>: reads 8 bytes at an address that is 4 past a multiple of 8"
    ),
    "copy_misaligned": (
        f"{FIRST} {COPIED}, called at <copy_misaligned>: cp.async reads at an address that is 4 "
        "past a multiple of 16"
    ),
    # Memory never written, and memory not to be written
    "shared_unwritten": (
        "CTA (0, 0, 0), thread 1, at <shared_unwritten>: reads 4 bytes at byte 4 of shared memory, "
        "which nobody has written"
    ),
    "global_unwritten": (
        f"{FIRST} <global_unwritten>: reads 4 bytes at byte 0 of b, which nobody has written"
    ),
    "atomic_unwritten": (
        f"{FIRST} <atomic_unwritten>: updates 4 bytes at byte 0 of b, which nobody has written"
    ),
    "write_to_input": (
        f"{FIRST} <write_to_input>: writes 4 bytes at byte 0 of a, an input of the kernel"
    ),
    # Copies in flight
    "copy_without_wait": (
        f"{THREAD} {LOAD}, called at <give_next>, called at <copy_without_wait>: reads 16 bytes at "
        f"byte # of shared memory, which a cp.async may still write: thread # wrote at {COPIED}, "
        "called at <issued>, and that thread has not waited for the copy"
    ),
    "copy_without_commit": (
        f"{THREAD} {LOAD}, called at <give_next>, called at <copy_without_commit>: reads 16 bytes "
        "at byte # of shared memory, which a cp.async may still write: thread # wrote at "
        f"{COPIES}, called at <left open>, and that thread has not waited for the copy"
    ),
    "wait_short_by_one": (
        f"{FIRST} {LOAD}, called at <wait_short_by_one>: reads 16 bytes at byte 256 of shared "
        f"memory, which a cp.async may still write: thread 0 wrote at {COPIES}, called at <second "
        "group>, and that thread has not waited for the copy"
    ),
    "write_into_copy": (
        f"{FIRST} <write_into_copy>: writes 4 bytes at byte 4 of shared memory, which a cp.async "
        f"may still write: thread 0 wrote at {COPIED}, called at <written into>, and that thread "
        "has not waited for the copy"
    ),
    "copy_source_changed": (
        f"{FIRST} {COPIES}, called at <copy_source_changed>: the source of a cp.async has changed "
        "before it was waited for"
    ),
    "copy_without_barrier": (
        f"CTA (0, 0, 0), thread 1, at {LOAD}, called at <give_earlier>, called at "
        "<copy_without_barrier>: reads 16 bytes at byte 0 of shared memory, which thread 0 wrote "
        f"at {COPIED}, called at <without barrier>, with no barrier between"
    ),
    "copy_into_read": race(
        f"{COPIED}, called at <copy_into_read>: writes 16 bytes",
        f"read at {LOAD}, called at <give_next>, called at <still reads>",
    ),
    # Races
    "read_after_write": (
        "CTA (0, 0, 0), thread 1, at <read_after_write>: reads 4 bytes at byte 0 of shared memory, "
        "which thread 0 wrote at <wrote>, with no barrier between"
    ),
    "write_after_read": race("<write_after_read>: writes 4 bytes", "read at <has read>"),
    "write_after_write": (
        "CTA (0, 0, 0), thread 1, at <write_after_write>: writes 4 bytes at byte 0 of shared "
        "memory, which thread 0 wrote at <write_after_write>, with no barrier between"
    ),
    "part_and_whole": (
        "CTA (0, 0, 0), thread 2, at <part_and_whole>: writes 4 bytes at byte 12 of shared memory, "
        "which thread 1 read at <part>, with no barrier between"
    ),
    "lanes": race("<lanes>: reads 4 bytes", "wrote at <lane wrote>"),
    "warps": race("<warps>: reads 4 bytes", "wrote at <warp wrote>"),
    "half_warp": race("<half_warp>: reads 4 bytes", "wrote at <half wrote>"),
    "named_barrier": race("<named_barrier>: reads 4 bytes", "wrote at <after arriving>"),
    "wrong_barrier": race("<wrong_barrier>: reads 4 bytes", "wrote at <pair wrote>"),
    "chain": race("<chain>: reads 4 bytes", "wrote at <chain wrote>"),
    "reused_barrier": race("<reused_barrier>: reads 4 bytes", "wrote at <before reuse>"),
    "two_readers": (
        f"{FIRST} <two_readers>: writes 4 bytes at byte 0 of c, which thread # read at <second "
        "reader>, with no barrier between"
    ),
    "three_readers": (
        f"{FIRST} <readers>: writes 4 bytes at byte 0 of c, which thread # read at <last reader>, "
        "with no barrier between"
    ),
    "ten_readers": (
        f"{FIRST} <readers>: writes 4 bytes at byte 0 of c, which thread # read at <last reader>, "
        "with no barrier between"
    ),
    "later_readers": (
        f"{FIRST} <later_readers>: writes 4 bytes at byte 0 of c, which thread # read at <later "
        "reader>, with no barrier between"
    ),
    "readers_of_line": (
        f"{FIRST} <readers_of_line>: writes 4 bytes at byte 12 of shared memory, which thread # "
        f"read at {LOAD}, called at <last reader of line>, with no barrier between"
    ),
    "ctas": (
        "CTA (1, 0, 0), thread 0, at <ctas>: reads 4 bytes at byte 0 of c, which thread 0 of CTA "
        "(0, 0, 0) wrote at <ctas>, with no barrier between"
    ),
    "atomic_and_plain": (
        f"{FIRST} <atomic_and_plain>: reads 4 bytes at byte 0 of c, which thread # updated at "
        "<atomic>, with no barrier between"
    ),
    "atomic_of_ctas": (
        "CTA (1, 0, 0), thread 0, at <atomic_of_ctas>: reads 4 bytes at byte 0 of c, which thread "
        "# updated at <last atomic>, with no barrier between"
    ),
    # Threads that do not meet
    "deadlock": (
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 32-63 wait in __syncthreads at "
        f"<deadlock: all>, threads 0-31 wait in barrier on barrier 1 at {BARRIER}, called at "
        "<deadlock: named>"
    ),
    "missing_lanes": (
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 16-31 wait in __shfl_xor_sync with "
        "mask 0xffffffff at <missing_lanes: high>, threads 0-15 wait in __syncthreads at "
        "<missing_lanes: low>"
    ),
    "divergent_shuffle": (
        f"{THREAD} <divergent_shuffle: high>: __shfl_xor_sync with mask 0xffffffff diverges: lanes "
        "0x0000ffff of the same warp are in __shfl_xor_sync with mask 0xffffffff at "
        "<divergent_shuffle: low>"
    ),
    "divergent_barrier": (
        f"{THREAD} <divergent_barrier: high>: __syncthreads diverges: lanes of the same warp wait "
        "at <divergent_barrier: low>"
    ),
    "wrong_mask": (
        "CTA (0, 0, 0), thread 31, at <wrong_mask>: __shfl_down_sync has mask 0x7fffffff, which "
        "leaves out lane 31, its own"
    ),
    "wrong_width": (
        f"{THREAD} <wrong_width>: __shfl_sync has width 12, which must be a power of two up to 32"
    ),
    "returned_lanes": (
        f"{THREAD} csrc/device/mma.h:#, called at csrc/device/mma.h:#, called at <returned_lanes>: "
        "mma.sync needs the whole warp, and lanes 0xc0000000 have returned"
    ),
    "wrong_barrier_number": (
        f"{THREAD} {BARRIER}, called at <wrong_barrier_number>: barrier names barrier 16, there "
        "are 16"
    ),
    "wrong_barrier_count": (
        f"{THREAD} {BARRIER}, called at <wrong_barrier_count>: barrier is for 40 threads, not a "
        "multiple of 32"
    ),
    "unequal_barrier_counts": (
        f"{THREAD} {BARRIER}, called at <unequal_barrier_counts>: barrier brings 96 threads to "
        "barrier 1, where others wait for 64"
    ),
    "divergent_load": (
        f"{THREAD} csrc/device/mma.h:#, called at <divergent_load: high>: ldmatrix with mask "
        "0xffffffff diverges: lanes 0x0000ffff of the same warp are in ldmatrix with mask "
        "0xffffffff at csrc/device/mma.h:#, called at <divergent_load: low>"
    ),
    "divergent_product": (
        f"{THREAD} {PRODUCT}, called at <divergent_product: high>: mma.sync with mask 0xffffffff "
        "diverges: lanes 0x0000ffff of the same warp are in mma.sync with mask 0xffffffff at "
        f"{PRODUCT}, called at <divergent_product: low>"
    ),
    "half_warps": (
        f"{THREAD} {BARRIER}, called at <half_warps>: a wait on barrier 1, for 32 threads, needs "
        "whole warps, and lanes 0x00010000 have returned"
    ),
    "half_of_another": (
        f"{THREAD} {BARRIER}, called at <half_of_another>: the barrier is complete, and lanes "
        f"0xffff0000 of warp 0 have not come, the others wait at {BARRIER}, called at "
        "<half_of_another>"
    ),
    "returned_before_barrier": (
        f"{THREAD} {BARRIER}, called at <returned_before_barrier>: barrier on barrier 1, for 64 "
        "threads, needs whole warps, and lanes 0xffff0000 have returned"
    ),
    "arrives_twice": (
        f"{THREAD} <arrives_twice>: barrier_arrive comes again to barrier 1, which its first "
        "arrival has not completed"
    ),
    "arrives_for_nobody": (
        f"{THREAD} <arrives_for_nobody>: barrier_arrive does not say for how many threads"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(emulator: Machine, name: str) -> None:
    arguments = LAUNCHES.get(name, WARP)
    emulator(name, **launched(arguments))
    assert_named(emulator, name, BROKEN[name], broken=True, **launched(arguments))


UNSEEN = """
#include "runtime/launch.h"

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
    emulator: Machine, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"nothing on a small case {sentence}")):
        emulator("nothing", **arguments)


def test_a_failed_launch_leaves_the_next_one_alone(emulator: Machine) -> None:
    arguments = launched(COPY)
    for broken in (True, False, True, False):
        if broken:
            with pytest.raises(RuntimeError, match="may still write"):
                emulator("copy_without_wait", broken=True, **arguments)
        else:
            emulator("copy_without_wait", **arguments)
            assert arguments["b"].equal(arguments["a"].roll(-4))


def test_what_one_launch_wrote_the_next_may_read(emulator: Machine) -> None:
    """Launches are ordered, and tensors are forgotten after their call."""
    total = torch.zeros(1)
    for _ in range(2):
        emulator("ctas", c=total, grid=(2, 1, 1))
    assert total.item() == 4
    with pytest.raises(RuntimeError, match="which nobody has written"):
        emulator("ctas", c=total, c_is="out", grid=(1, 1, 1), broken=True)
