"""For each of the emulator's detectors around mbarriers, clusters, registers that warpgroups pass
on and semaphores a kernel with the mistake that it is there to find. The same kernels without:
test_clusters.py."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_cases import ARRIVAL, EXCHANGE, RING, ROLES, STORES, TURNS
from emulated import Machine, assert_named, launched

pytestmark = pytest.mark.usefixtures("hopper")

MBARRIER, CLUSTER = "csrc/device/mbarrier.h:#", "csrc/device/cluster.h:#"
WARPGROUP, SEMAPHORE = "csrc/device/warpgroup.h:#", "csrc/device/semaphore.h:#"
CALLED = "called at tests/emulator/kernels/sm90/mbarriers.cu:#"
FULL = "the mbarrier at byte 2048"
EMPTY = "the mbarrier at byte 2064"
MADE = f"initialised at {MBARRIER}, called at <initialised>, {CALLED}"
MADE_EMPTY = f"initialised at {MBARRIER}, {CALLED}, {CALLED}"
FILL = f"csrc/device/tma.h:#, called at <fill of the ring>, {CALLED}"
USE = f"csrc/device/vector.h:#, called at <use of the stage>, {CALLED}"
THREAD = "CTA (#, 0, 0), thread #, at"


def deadlock(*waiting: str) -> str:
    return "deadlock, nobody can go on; CTA (0, 0, 0): " + ", ".join(waiting)


def producer(left: str) -> str:
    return (
        f"threads 0 wait in mbarrier_wait for parity 0 of {EMPTY} (in phase 0, {left} to come, "
        f"{MADE_EMPTY}) at {MBARRIER}, {CALLED}, {CALLED}"
    )


def consumers(parity: int, left: str) -> str:
    return (
        f"threads 32-95 wait in mbarrier_wait for parity {parity} of {FULL} (in phase {parity}, "
        f"{left} to come, {MADE}) at {MBARRIER}, called at <wait for full>, {CALLED}"
    )


# How each kernel is launched, or one mistake of it.
LAUNCHES: dict[str, dict[str, Any]] = {
    "pipeline": RING,
    "released_by_one": RING,
    "arrivals": STORES,
    "waited_by_one": STORES,
    "waited_by_first": STORES,
    "registers": ROLES,
    "registers 0": {"b": 160, "threads": 160},
    "exchange": EXCHANGE,
    "split": EXCHANGE,
    "remote_arrival": ARRIVAL,
    "remote_arrival_by_one": ARRIVAL,
    "turns_of_ctas": TURNS,
}

# "kernel mistake", a number -> what is said after the kernel's name
BROKEN: dict[str, str] = {
    # a consumer's phase is wrong, and it goes ahead
    "pipeline 1": (
        f"{THREAD} {USE}: reads 16 bytes at byte # of shared memory, which nobody has written"
    ),
    # the producer's
    "pipeline 2": deadlock(
        consumers(0, "1 of 1 arrival and 0 bytes"),
        producer("64 of 64 arrivals and 0 bytes"),
        "threads 1-31 returned",
    ),
    # expects too much
    "pipeline 3": deadlock(
        consumers(0, "0 of 1 arrival and 16 bytes"),
        producer("64 of 64 arrivals and 0 bytes"),
        "threads 1-31 returned",
    ),
    # expects too little
    "pipeline 4": (
        f"an asynchronous copy brings 1024 bytes to {FULL} of CTA (0, 0, 0), which expects 1008 "
        f"more: in phase 0, 0 of 1 arrival and 1008 bytes to come, {MADE}"
    ),
    # a stage is released before it is read
    "pipeline 5": (
        f"{THREAD} {FILL}: writes 1024 bytes at byte # of shared memory, which thread # read at "
        f"{USE}, with no barrier between"
    ),
    # one consumer does not wait
    "pipeline 6": (
        f"{THREAD} {USE}: reads 16 bytes at byte # of shared memory, which a bulk copy may still "
        f"write that thread 0 started at {FILL} and that has not been waited for"
    ),
    # fewer arrivals than the barrier counts
    "pipeline 7": deadlock(
        producer("1 of 65 arrivals and 0 bytes"),
        consumers(1, "1 of 1 arrival and 0 bytes"),
        "threads 1-31 returned",
    ),
    # the producer does not wait
    "pipeline 8": (
        f"{THREAD} {MBARRIER}, called at <expects>, {CALLED}: mbarrier_arrive_expect_tx is one "
        f"arrival more than the 1 of each phase of {FULL}, in phase 0, 0 of 1 arrival and 1024 "
        f"bytes to come, {MADE}"
    ),
    # no fence after the initialisation
    "pipeline 10": (
        f"{THREAD} {FILL}: bulk_load may not see that thread 0 has initialised {FULL} at "
        f"{MADE.removeprefix('initialised at ')}, which mbarrier_init_fence did not follow"
    ),
    # no barrier after it
    "pipeline 11": (
        f"{THREAD} {MBARRIER}, called at <wait for full>, {CALLED}: mbarrier_wait may come before "
        f"thread 0 has initialised {FULL} at {MADE.removeprefix('initialised at ')}: no barrier "
        "between"
    ),
    # initialised twice
    "pipeline 12": (
        f"{THREAD} {MBARRIER}, called at <initialised again>, {CALLED}: mbarrier_init comes again "
        f"to {FULL}, in phase 0, 1 of 1 arrival and 0 bytes to come, {MADE}"
    ),
    # read as memory
    "pipeline 13": (
        f"{THREAD} <as memory>, {CALLED}: reads 8 bytes at byte 2048 of shared memory, which is an "
        f"mbarrier since thread 0 was at {MADE.removeprefix('initialised at ')}"
    ),
    # overwritten
    "pipeline 18": (
        f"{THREAD} <overwritten mbarrier>, {CALLED}: writes 8 bytes at byte 2048 of shared memory, "
        f"which is an mbarrier since thread 0 was at {MADE.removeprefix('initialised at ')}"
    ),
    # the last copy is not waited for
    "pipeline 14": (
        f"CTA (0, 0, 0) returned before a bulk_load, at {FILL}, had written its shared memory"
    ),
    # a barrier was not initialised
    "pipeline 15": (
        f"{THREAD} {MBARRIER}, {CALLED}, {CALLED}: mbarrier_wait names byte 2072 of shared memory, "
        "where no mbarrier has been initialised"
    ),
    "pipeline 16": (
        f"{THREAD} {MBARRIER}, called at <misaligned>, {CALLED}: mbarrier_arrive is given byte 4 "
        "of shared memory, not a multiple of 8"
    ),
    "pipeline 17": (
        f"{THREAD} {MBARRIER}, called at <wait for full>, {CALLED}: mbarrier_wait waits for parity "
        "2"
    ),
    "released_by_one 1": (
        f"{THREAD} {FILL}: writes 1024 bytes at byte # of shared memory, which thread # read at "
        "csrc/device/vector.h:#, called at <used by all>, with no barrier between"
    ),
    "arrivals 1": (
        f"{THREAD} <loaded>: reads 4 bytes at byte # of shared memory, which nobody has written"
    ),
    "waited_by_one 1": (
        f"{THREAD} <not waited>: reads 4 bytes at byte # of shared memory, which nobody has written"
    ),
    "waited_by_first 1": (
        f"{THREAD} <before the first has waited>: reads 4 bytes at byte # of shared memory, which "
        "a bulk copy may still write that thread 0 started at csrc/device/tma.h:#, called at "
        "tests/emulator/kernels/sm90/mbarriers.cu:# and that has not been waited for"
    ),
    # one warp of four
    "registers 1": (
        "CTA (0, 0, 0): warps 0 and 3 of one warpgroup have asked for different registers, or one "
        "of them has not asked"
    ),
    "registers 2": deadlock(
        "threads 352-383 wait in warpgroup_reg_alloc to 248 registers a thread (all warps hold "
        f"2000 together, and the CTA has 2016) at {WARPGROUP}, called at <more than there is>",
        "threads 0-351 returned",
    ),
    "registers 3": (
        f"{THREAD} {WARPGROUP}, called at <gives back more>: warpgroup_reg_dealloc to 200 "
        "registers a thread, of which this warp has 168"
    ),
    "registers 4": (
        f"{THREAD} {WARPGROUP}, called at <asks for fewer>: warpgroup_reg_alloc to 24 registers a "
        "thread, of which this warp has 168"
    ),
    "registers 5": (
        f"{THREAD} {WARPGROUP}, called at <one lane>: warpgroup_reg_dealloc needs the whole warp, "
        "and lanes 0xfffffffe have returned"
    ),
    "registers 0": (
        f"{THREAD} {WARPGROUP}, called at tests/emulator/kernels/sm90/mbarriers.cu:#: "
        "warpgroup_reg_alloc is for whole warpgroups, and the CTA has 160 threads"
    ),
    # no cluster_sync before
    "exchange 1": (
        f"{THREAD} <of the next>: reaches into shared memory of CTA (#, 0, 0), which may not have "
        "started: no cluster_sync before"
    ),
    # nor after
    "exchange 2": (
        f"{THREAD} <left there>: the CTA returns and does not know whether thread # of CTA (#, 0, "
        "0) has done with its shared memory, which it touched there"
    ),
    # __syncthreads instead
    "exchange 3": (
        f"{THREAD} <of the next>: reads 4 bytes at byte # of shared memory of CTA (1, 0, 0), which "
        "thread # of CTA (1, 0, 0) wrote at <own part>, with no barrier between"
    ),
    "exchange 4": (
        f"{THREAD} {CLUSTER}, called at <last sync>: cluster_sync comes again with no cluster_wait "
        "in between"
    ),
    "exchange 5": (
        f"{THREAD} {CLUSTER}, called at <waits first>: cluster_wait comes before this thread's "
        "cluster_arrive"
    ),
    "exchange 6": (
        f"{THREAD} {CLUSTER}, called at <mapped>: cluster_map names CTA 2 of a cluster of 2"
    ),
    "exchange 7": (
        f"{THREAD} {CLUSTER}, called at <mapped>: cluster_map is given an address outside of its "
        "CTA's shared memory"
    ),
    "exchange 8": (
        f"{THREAD} <of the next>: reads 4 bytes, 0 bytes past the end of shared memory of CTA (#, "
        "0, 0) (512 bytes)"
    ),
    # one thread does something else
    "exchange 9": deadlock(
        "threads 0 wait in __syncthreads at <not alone>",
        f"threads 1-63 wait in cluster_sync (127 of 128 threads have arrived) at {CLUSTER}, "
        "called at <one more>; CTA (1, 0, 0): threads 0-63 wait in cluster_sync (127 of 128 "
        f"threads have arrived) at {CLUSTER}, called at <one more>",
    ),
    "exchange 10": (
        f"{THREAD} {CLUSTER}, called at <high lanes arrive>: cluster_sync diverges: other lanes of "
        "the same warp came by another way"
    ),
    "exchange 11": (
        f"{THREAD} <of the next>: reads 4 bytes at byte # of shared memory of CTA (1, 0, 0), which "
        "nobody has written"
    ),
    # written after arriving
    "split 1": (
        f"{THREAD} <after waiting>: reads 4 bytes at byte # of shared memory of CTA (#, 0, 0), "
        "which thread # of CTA (#, 0, 0) wrote at <too late>, with no barrier between"
    ),
    "remote_arrival 1": (
        f"{THREAD} {MBARRIER}, called at <arrives there>: mbarrier_arrive_cluster may not see that "
        f"thread 0 of CTA (0, 0, 0) has initialised the mbarrier at byte 256 at {MBARRIER}, called "
        "at <unfenced>, which mbarrier_init_fence did not follow"
    ),
    "remote_arrival 2": (
        f"{THREAD} {MBARRIER}, called at <arrives there>: the CTA returns and does not know "
        "whether thread # of CTA (1, 0, 0) has done with its shared memory, which it touched there"
    ),
    "remote_arrival 3": (
        f"{THREAD} <overwritten there>: writes 4 bytes at byte # of shared memory, which thread # "
        "of CTA (1, 0, 0) read at <reads there>, with no barrier between"
    ),
    "remote_arrival_by_one 1": (
        f"{THREAD} <overwritten after one arrival>: writes 4 bytes at byte # of shared memory, "
        "which thread # of CTA (1, 0, 0) read at <read by all there>, with no barrier between"
    ),
    # each waits for one that has not started
    "turns_of_ctas 1": deadlock(
        f"threads 0 wait in semaphore_wait for 4 where 0 is at {SEMAPHORE}, called at <for its "
        "turn>",
        "threads 1-31 returned; CTA (1, 0, 0): threads 0 wait in semaphore_wait for 3 where 0 "
        f"is at {SEMAPHORE}, called at <for its turn>",
        "threads 1-31 returned",
    ),
}


def launch_of(case: str) -> tuple[str, dict[str, Any]]:
    """The kernel, and how it is launched with the mistake."""
    name, mistake = case.split()
    made = launched(LAUNCHES.get(case, LAUNCHES[name]))
    return name, {**made, "broken": int(mistake)}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_is_found_and_named(emulator: Machine, case: str) -> None:
    name, launch = launch_of(case)
    assert_named(emulator, name, BROKEN[case], **launch)


@pytest.mark.parametrize(("order", "copies"), [("reverse", "late"), ("1", "late"), ("2", "early")])
@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_is_found_on_other_schedules(
    emulator: Machine, case: str, order: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", order)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    name, launch = launch_of(case)
    with pytest.raises(RuntimeError):
        emulator(name, **launch)


def test_older_machines_have_none_of_it(emulator: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
    sentence = "mbarrier_init needs compute capability 9.0, and GPTKERNELS_EMULATE_ARCH is sm80"
    with pytest.raises(RuntimeError, match=sentence):
        emulator("pipeline", **launched(RING))
    with pytest.raises(RuntimeError, match=r"asks for clusters, which compute capability 8\.0"):
        emulator("exchange", **launched(EXCHANGE))
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm70")
    with pytest.raises(RuntimeError, match="EMULATE_ARCH must be sm80 or sm90, got sm70"):
        emulator("nothing")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, a CTA has 232448"),
        ({"cluster": 3, "grid": (3, 1, 1)}, "clusters of 3 CTAs, not 1, 2, 4 or 8"),
        ({"cluster": 16, "grid": (16, 1, 1)}, "clusters of 16 CTAs, not 1, 2, 4 or 8"),
        ({"cluster": 4, "grid": (6, 1, 1)}, "a grid of 6 CTAs along x, in clusters of 4"),
    ],
)
def test_what_cannot_be_launched(
    emulator: Machine, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=f"nothing on a small case asks for {sentence}"):
        emulator("nothing", **arguments)
