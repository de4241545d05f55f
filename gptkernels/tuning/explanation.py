"""What the table says, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.core import plans
from gptkernels.core.tuned import Entry, Key
from gptkernels.tuning.trial import is_pytorchs


@dataclass(frozen=True)
class Explanation:
    """Why impl="auto" runs what it runs.

    key: the class of calls.
    sizes: of the measured call, the largest of the part of the class that this is about.
    way: what wins there (`core.tuned` lists the names).
    seconds: how long it takes there.
    pytorch_s: how long the best of PyTorch's takes; equal to `seconds` where that wins.
    margin: how many times as fast the winner is as that.
    error, limit: its error against fp64 and what the parity rule allows, where they were measured.
    others: every other way, and why it does not win.
    origin: "here", or the machine of the shipped table that it is from.
    """

    key: Key
    sizes: dict[str, int]
    way: str
    seconds: float
    pytorch_s: float
    margin: float
    error: float | None
    limit: float | None
    others: dict[str, str]
    origin: str

    def __str__(self) -> str:
        return (
            f"{self.key.op} {self.key.direction}, {said(self.sizes)}: {self.way}, "
            f"{self.seconds * 1e6:.1f} us, {self.margin:.2f} times as fast as PyTorch"
        )


def is_of_these_threads(key: Key) -> bool:
    """Whether calls of the class are made with as many CPU threads as there are now."""
    return dict(key.facts)["threads"] in (0, torch.get_num_threads())


def explain(op: str | None = None, device: str | None = None) -> list[Explanation]:
    """Every choice that the tables make on this machine, with as many threads as there are now.

    Args:
        op: of this operator alone.
        device: "cpu" or "cuda"; None means both, where there is a GPU.
    """
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        explanation
        for device_type in devices
        for entry in plans.table(device_type).entries.values()
        if op in (None, entry.key.op) and is_of_these_threads(entry.key)
        for explanation in of_entry(entry)
    ]


def of_entry(entry: Entry) -> Iterator[Explanation]:
    """One for each range of a class."""
    for end, way in entry.ranges:
        point = min(entry.points, key=lambda p: abs(p["position"] - end), default=None)
        if point is not None:
            yield _explanation(entry, way, point)


def said(sizes: dict[str, int]) -> str:
    """Sizes in words."""
    return " ".join(f"{axis} {size}" for axis, size in sizes.items())


def _explanation(entry: Entry, way: str, point: dict[str, Any]) -> Explanation:
    seconds = {name: times[0] for name, times in point["times"].items()}
    own = seconds[way]
    pytorch = min(s for name, s in seconds.items() if is_pytorchs(name))
    error, limit = entry.errors.get(way, (None, None))
    others = {
        name: _why_not(name, s, own, name in point["holds"])
        for name, s in sorted(seconds.items(), key=lambda pair: pair[1])
        if name != way
    }
    others |= {name: f"refused: {why}" for name, why in entry.refused.items()}
    sizes = dict(point["sizes"])
    return Explanation(
        entry.key, sizes, way, own, pytorch, pytorch / own, error, limit, others, entry.origin
    )


def _why_not(name: str, seconds: float, own: float, holds: bool) -> str:
    said = f"{seconds * 1e6:.1f} us, {seconds / own:.2f} times as long"
    if seconds < own and not holds and not is_pytorchs(name):
        return f"{said}, but not surely faster than PyTorch"
    if seconds < own:
        return f"{said} here, but not at the other end of the class"
    return said
