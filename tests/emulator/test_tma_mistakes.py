"""For each of the emulator's detectors around the tensor memory accelerator a kernel with the
mistake that it is there to find, and the same kernel without
(tests/emulator/kernels/sm90/tma_mistakes.cu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import Machine, Map, assert_named
from torch import Tensor

pytestmark = pytest.mark.usefixtures("hopper")

THREAD = "CTA (0, 0, 0), thread #, at"
CALL = f"{THREAD} csrc/device/tma.h:#, called at"
STARTED = (
    "which a bulk copy may still write that thread 0 started at csrc/device/tma.h:#, called at"
)
START = "<start_load>, called at tests/emulator/kernels/sm90/tma_mistakes.cu:#"
FILLED = "<fill>, called at tests/emulator/kernels/sm90/tma_mistakes.cu:#"
STORED = "<store>, called at <store_and_wait>"
UNFENCED = "with no fence_proxy_async of that thread between"
BARRIER = "the mbarrier at byte 4096"
BOX = 4096  # bytes of 32 rows of 32 floats


def loads(**changes: Any) -> dict[str, Any]:
    box = Map(torch.randn(64, 32), (32, 32))
    return {"map": box, "at": (0, 0), "b": torch.empty(32, 32), **changes}


def stores(**changes: Any) -> dict[str, Any]:
    return {"map": Map(torch.empty(64, 32), (32, 32), role="out"), "at": (0, 0), **changes}


def bytes_of(*at: int) -> dict[str, Any]:
    a, b = torch.randn(32, 32), torch.empty(32, 32)
    return {"a": a, "b": b, "at": at, "bytes": BOX}


def at_both(made: Callable[..., dict[str, Any]], tensor: Tensor, role: str) -> dict[str, Any]:
    """b is the map's tensor."""
    return made(map=Map(tensor, (32, 32), role=role), b=tensor, b_is="")


# name -> (its launch, what is said after the name), as in test_emulator_mistakes.py
BROKEN: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "load_without_wait": (
        loads,
        f"{THREAD} <give>, called at <load_without_wait>: reads 4 bytes at byte # of shared "
        f"memory, {STARTED} {START} and that has not been waited for",
    ),
    "load_overwritten": (
        loads,
        f"{THREAD} <load_overwritten>: writes 4 bytes at byte # of shared memory, {STARTED} "
        f"{START} and that has not been waited for",
    ),
    "load_into_read": (
        loads,
        f"{THREAD} <give>, called at tests/emulator/kernels/sm90/tma_mistakes.cu:#: reads 4 "
        f"bytes at byte # of shared memory, {STARTED} <load_into_read> and that has not been "
        "waited for",
    ),
    "load_into_load": (
        lambda: loads(bytes=2 * BOX),
        f"{CALL} <load_into_load>: writes {BOX} bytes at byte 0 of shared memory, {STARTED} "
        f"{START} and that has not been waited for",
    ),
    "load_source_changed": (
        lambda: at_both(loads, torch.randn(64, 32), "inout"),
        f"the source of a tma_load, at csrc/device/tma.h:#, called at {START}, has changed "
        "before it landed",
    ),
    "load_of_stored": (
        lambda: at_both(loads, torch.randn(64, 32), "inout"),
        f"{CALL} {START}: reads 128 bytes at byte 132 of map by the asynchronous proxy, which "
        "thread 0 wrote at <load_of_stored> in this launch: fence_proxy_async covers no global "
        "memory",
    ),
    "load_never_awaited": (
        lambda: loads(b=None),
        f"CTA (0, 0, 0) returned before a tma_load, at csrc/device/tma.h:#, called at {START}, "
        "had written its shared memory",
    ),
    "load_expects, 16 more": (
        loads,
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 0-31 wait in mbarrier_wait for "
        f"parity 0 of {BARRIER} (in phase 0, 0 of 1 arrival and 16 bytes to come, ...",
    ),
    "load_expects, 16 fewer": (
        lambda: loads(broken=-1),
        f"an asynchronous copy brings {BOX} bytes to {BARRIER} of CTA (0, 0, 0), which expects "
        "4080 more: ...",
    ),
    "load_misaligned": (
        lambda: loads(b=None, bytes=2 * BOX, broken=16),
        f"{CALL} <load_misaligned>: tma_load with an address in shared memory that is 16 past "
        "a multiple of 128",
    ),
    "load_misaligned, swizzled": (
        lambda: loads(b=None, bytes=2 * BOX, map=Map(torch.randn(64, 32), (32, 32), 3), broken=128),
        f"{CALL} <load_misaligned>: tma_load with an address in shared memory that is 128 past "
        "a multiple of 1024",
    ),
    "load_past_end": (
        lambda: loads(b=None),
        f"{CALL} <load_past_end>: writes {BOX} bytes, the last 448 past the end of shared "
        "memory (4160 bytes)",
    ),
    "load_wrong_rank": (
        lambda: loads(b=None),
        f"{CALL} <load_wrong_rank>: tma_load at 3 coordinates of a tensor of 2 dimensions",
    ),
    "prefetch_of_none": (
        lambda: loads(b=None),
        f"{CALL} <prefetch_of_none>: tma_prefetch of a tensor map that is none: tensor_map did "
        "not make it",
    ),
    "map_elsewhere": (
        lambda: loads(b=None, a=torch.randn(64)),
        f"{CALL} <map_elsewhere>: tma_prefetch of a tensor map that is not among the kernel's "
        "parameters",
    ),
    "multicast_outside": (
        lambda: loads(b=None, grid=(2, 1, 1), cluster=2),
        f"{CALL} <multicast_outside>: tma_load_multicast names CTA 2 of a cluster of 2",
    ),
    "multicast_into_read": (
        lambda: loads(grid=(2, 1, 1), cluster=2),
        f"{CALL} <multicast_into_read>: writes {BOX} bytes at byte # of shared memory, which "
        "thread # read at <late>, with no barrier between",
    ),
    "store_without_fence": (
        stores,
        f"{CALL} {STORED}, called at <store_without_fence>: reads 128 bytes at byte 0 of "
        f"shared memory by the asynchronous proxy, which thread 0 wrote at {FILLED}, {UNFENCED}",
    ),
    "store_fenced_by_one": (
        stores,
        f"{CALL} {STORED}, called at <store_fenced_by_one>: reads 128 bytes at byte 4 of "
        f"shared memory by the asynchronous proxy, which thread 1 wrote at {FILLED}, {UNFENCED}",
    ),
    "store_fenced_late": (
        stores,
        f"{CALL} {STORED}, called at <store_fenced_late>: reads 128 bytes at byte 0 of shared "
        f"memory by the asynchronous proxy, which thread 0 wrote at <filled alone>, {UNFENCED}",
    ),
    "store_written_after_fence": (
        stores,
        f"{CALL} {STORED}, called at <store_written_after_fence>: reads 128 bytes at byte 0 of "
        "shared memory by the asynchronous proxy, which thread 0 wrote at <after the fence>, "
        f"{UNFENCED}",
    ),
    "store_without_barrier": (
        stores,
        f"{CALL} {STORED}, called at <store_without_barrier>: reads 128 bytes at byte 0 of "
        f"shared memory, which thread 0 wrote at {FILLED}, with no barrier between",
    ),
    "store_of_unwritten": (
        stores,
        f"{CALL} {STORED}, called at <store_of_unwritten>: reads 128 bytes at byte 0 of shared "
        "memory, which nobody has written",
    ),
    "store_source_changed": (
        stores,
        f"{CALL} <store_source_changed>: the source of a tma_store, at "
        "csrc/device/tma.h:#, called at <store>, called at <source changed>, has changed "
        "before it was waited for",
    ),
    "store_source_rewritten": (
        stores,
        f"{CALL} <store_source_rewritten>: byte 0 of shared memory, which a "
        "tma_store, at csrc/device/tma.h:#, called at <store>, called at <source rewritten>, "
        "may still read, thread 0 wrote at <rewritten> before that was waited for",
    ),
    "store_wait_short_by_one": (
        stores,
        f"{CALL} <store>, called at <of the newer group>: this thread returns without having "
        "waited for its tma_store",
    ),
    "write_wait_short_by_one": (
        stores,
        f"{CALL} <store>, called at <the newer store>: this thread returns without having "
        "waited for its tma_store",
    ),
    "store_never_awaited": (
        stores,
        f"{CALL} <store>, called at <store_never_awaited>: this thread returns without having "
        "waited for its tma_store",
    ),
    "store_never_committed": (
        stores,
        f"{CALL} <store_never_committed>: this thread returns without having waited for its "
        "tma_store, which no bulk_commit has closed",
    ),
    "store_read_back": (
        lambda: at_both(stores, torch.empty(32, 32), "out"),
        f"{THREAD} <store_read_back>: reads 4 bytes at byte 0 of map, {STARTED} <store>, "
        "called at <read back> and that has not been waited for",
    ),
    "store_twice": (
        lambda: stores(grid=(2, 1, 1)),
        "CTA (1, 0, 0), thread 0, at csrc/device/tma.h:#, called at <store>, called at "
        "<store_twice>: writes 128 bytes at byte 0 of map, which thread 0 of CTA (0, 0, 0) "
        "copied to at csrc/device/tma.h:#, called at <store>, called at <store_twice>, with no "
        "barrier between",
    ),
    "sums_in_turn": (
        lambda: {"b": torch.zeros(1025), "b_is": "inout", "bytes": BOX, "grid": (2, 1, 1)},
        f"{THREAD} csrc/device/semaphore.h:#, called at <released early>: semaphore_release "
        "while a bulk_reduce_add, at csrc/device/tma.h:#, called at <sums_in_turn>, may still "
        "write to global memory: this thread has not called bulk_wait",
    ),
    "bulk_multiples, of a number": (
        lambda: bytes_of(520, 0, 0),
        f"{CALL} <bulk_multiples>: bulk_load with a number of bytes that is 8 past a multiple "
        "of 16",
    ),
    "bulk_multiples, none": (
        lambda: bytes_of(0, 0, 0),
        f"{CALL} <bulk_multiples>: bulk_load of 0 bytes",
    ),
    "bulk_multiples, in global memory": (
        lambda: bytes_of(512, 4, 0),
        f"{CALL} <bulk_multiples>: bulk_load with an address in global memory that is 4 past a "
        "multiple of 16",
    ),
    "bulk_multiples, in shared memory": (
        lambda: bytes_of(512, 0, 8),
        f"{CALL} <bulk_multiples>: bulk_load with an address in shared memory that is 8 past a "
        "multiple of 16",
    ),
    "bulk_to_input": (
        bytes_of,
        f"{CALL} <bulk_to_input>: writes 512 bytes at byte 0 of a, an input of the kernel",
    ),
    "bulk_add_to_unwritten": (
        bytes_of,
        f"{CALL} <bulk_add_to_unwritten>: updates 512 bytes at byte 0 of b, which nobody has "
        "written",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(emulator: Machine, name: str) -> None:
    arguments, sentence = BROKEN[name]
    kernel = name.split(",")[0]
    emulator(kernel, **{**arguments(), "broken": 0})
    assert_named(emulator, kernel, sentence, **{"broken": 1, **arguments()})


# A copy that is over at once is not found in flight.
LATE = ("load_source_changed", "load_never_awaited", "store_read_back")


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("schedule", ["forward", "reverse", "1"])
def test_mistakes_are_found_in_any_order(
    emulator: Machine, schedule: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    for name, (arguments, _) in BROKEN.items():
        print(name)
        kernel = name.split(",")[0]
        emulator(kernel, **{**arguments(), "broken": 0})
        if copies == "late" or name not in LATE:
            assert_named(emulator, kernel, "...", **{"broken": 1, **arguments()})
