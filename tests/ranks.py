"""Runs a function on the ranks of a group of processes, which gloo joins on this machine."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptkernels.core import tuned_files

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch lacks gloo"
)


def _rank(
    rank: int, world: int, given: dict[str, str], work: Callable[[int, int], Any], answers: Any
) -> None:
    """What a process of the group runs; it answers with what `work` returns, and its warnings."""
    os.environ.update(given)
    tuned_files._SHIPPED = Path("nowhere")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(given["TEST_STORE"], world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = work(rank, world)
        ours = [str(w.message) for w in said if "gptkernels" in str(w.message)]
        answers.put((rank, found, ours))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), []))
        raise


def on_ranks(
    world: int, folder: Path, work: Callable[[int, int], Any]
) -> tuple[list[Any], list[list[str]]]:
    """What `work(rank, world)` returns and warns of on each rank."""
    # PyTorch is imported once, by the server, which has started no threads.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "gptkernels.tuning.ranks"])
    answers = context.Queue()
    given = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TEST_STORE": str(folder / "store"),
    }
    ranks = [
        context.Process(target=_rank, args=(rank, world, given, work, answers))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        got = sorted((answers.get(timeout=90) for _ in ranks), key=lambda answer: answer[0])
        for process in ranks:
            process.join(timeout=30)
    finally:
        for process in ranks:
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world, got
    return [found for _, found, _ in got], [said for _, _, said in got]
