"""One table for all ranks of a process group.

Ranks that compute parts of the same training step should compute them alike: a rank that runs by
another way has results with other last bits, and one that takes longer holds up all others. But
each process reads its own file, on its own machine. So the first rank of the group gives its table
to all, where their devices are such that its measurements hold for them too. Where anything stands
against that, no rank has a table.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from gptkernels.core import plans, tuned_files
from gptkernels.core.errors import in_a_line
from gptkernels.core.tuned import Entry, Table

_Facts = dict[str, str]
# More ranks than these are counted, not named.
_MOST_NAMED = 8


def sync(group: dist.ProcessGroup | None = None) -> str:
    """Let all ranks of a process group use one table, that of the group's first rank.

    All ranks of the group call it, as every collective operation of torch.distributed, after
    torch.cuda.set_device where they train on GPUs, and before their first step. The table is that
    of the device that they train on: a GPU where the group communicates by NCCL or is bound to a
    GPU, else the CPU. Ranks agree where their devices have the same fingerprint, on a CPU also the
    same number of threads, and where GPTKERNELS_TUNE and GPTKERNELS_IMPL are the same. The first
    rank then sends its table, from memory or its files, and all compare what they have.

    Where ranks differ, or one of them fails, all of them drop their tables and take the static
    policy, and the first rank gives one warning that says which ranks differ, and in what.

    Args:
        group: The process group; None means the default one, of all ranks.

    Returns:
        The digest of the table that all ranks of the group use now; "" where they use none.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sync needs torch.distributed: call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise RuntimeError(f"sync: rank {dist.get_rank()} is not in the group")
    device_type = _device_type(group)
    # Every rank sees what all ranks have said, and so all take the same branch each time.
    said = _differing(group, _gathered(group, _facts(device_type)))
    if not said:
        found = _installed(group, device_type, _sent(group, device_type))
        said = _differing(group, _gathered(group, found))
        if not said:
            return found["table"]
    plans.use(device_type, Table())
    if dist.get_rank(group) == 0:
        warnings.warn(f"gptkernels uses no tuned table on any rank: {said}", stacklevel=2)
    return ""


def _device_type(group: dist.ProcessGroup | None) -> str:
    """Where the ranks train."""
    given = dist.group.WORLD if group is None else group
    bound = getattr(given, "bound_device_id", None)
    if bound is not None:
        return str(bound.type)
    # Such as "nccl" or "cpu:gloo,cuda:nccl". Gloo says nothing: it takes tensors of any device.
    nccl = "nccl" in dist.get_backend_config(group)
    return "cuda" if nccl and torch.cuda.is_available() else "cpu"


def _facts(device_type: str) -> _Facts:
    """All that must be the same on all ranks. It never raises: the other ranks would wait."""
    try:
        found = dict(tuned_files.fingerprint(device_type))
        if device_type == "cpu":
            found["threads"] = str(torch.get_num_threads())
        found["GPTKERNELS_TUNE"] = "cached" if tuned_files.switched_on() else "off"
        found["GPTKERNELS_IMPL"] = os.environ.get("GPTKERNELS_IMPL", "")
        return found
    except Exception as error:
        return _failure(error)


def _sent(group: dist.ProcessGroup | None, device_type: str) -> _Facts:
    """What the group's first rank has: the entries of its table as text, or its failure."""
    message: list[_Facts] = [{}]
    if dist.get_rank(group) == 0:
        try:
            entries = plans.table(device_type).entries.values()
            message[0] = {"entries": json.dumps([entry.as_dict() for entry in entries])}
        except Exception as error:
            message[0] = _failure(error)
    first = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(message, src=first, group=group)
    return message[0]


def _installed(group: dist.ProcessGroup | None, device_type: str, message: _Facts) -> _Facts:
    """The digest of the table in the message, which this process uses from now on. It never raises
    either."""
    if "failure" in message:  # which is the first rank's alone
        return message if dist.get_rank(group) == 0 else {}
    try:
        # The first rank, too, takes the entries as they were sent.
        plans.use(device_type, Table(map(Entry.from_dict, json.loads(message["entries"]))))
        table = plans.table(device_type)
        return {"table": table.digest() if table.entries else ""}
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> _Facts:
    return {"failure": in_a_line(error)}


def _gathered(group: dist.ProcessGroup | None, facts: _Facts) -> list[_Facts]:
    """What each rank of the group says, in the order of its ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, facts, group=group)
    return found


def _differing(group: dist.ProcessGroup | None, found: Sequence[_Facts]) -> str:
    """In what the ranks differ, or how they failed; "" where there is nothing to say."""
    ranks = range(len(found))
    names = [rank if group is None else dist.get_global_rank(group, rank) for rank in ranks]
    failed = [rank for rank in ranks if "failure" in found[rank]]
    if failed:
        who = _named([names[rank] for rank in failed])
        return f"{who} failed ({found[failed[0]]['failure']})"
    parts = []
    for fact in sorted(set().union(*found)):
        values = [facts.get(fact) for facts in found]
        others = [rank for rank in ranks if values[rank] != values[0]]
        if others:
            who = _named([names[rank] for rank in others])
            verb = "differs" if len(others) == 1 else "differ"
            first = f"{values[others[0]]!r}, where rank {names[0]} has {values[0]!r}"
            parts.append(f"{who} {verb} in {fact} ({first})")
    return "; ".join(parts)


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    names = [str(rank) for rank in ranks[:_MOST_NAMED]]
    rest = len(ranks) - len(names)
    last = f"{rest} more" if rest else names.pop()
    return f"ranks {', '.join(names)} and {last}"
