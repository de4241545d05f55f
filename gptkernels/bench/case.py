"""What is timed: one shape of one operator, and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkernels.core.choice import unavailable

BASELINE = "pytorch"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

Call = Callable[[], Any]
# What takes part by name, made when its turn comes: making it may compile, and may raise.
Makers = Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Case:
    """One direction of one shape of one operator.

    Args:
        op: the operator's name, as in `gptkernels.<op>`.
        shape: readable sizes, such as "B8 T1024 C768".
        dtype: dtype of the activations.
        direction: "forward", "backward" or "forward+backward".
        plain: the baseline, eager PyTorch.
        ours: implementation -> what makes its call.
        peers: name of a peer -> what makes its call.
        bytes_moved: bytes that any implementation must read and write, 0 where not counted.
        flops: floating-point operations that any implementation must do, 0 where not counted.
        working_set: bytes of these that lie in memory at a time; 0: all of them.
        sizes: the numbers in `shape` by their letters, which plots have as an axis.
        series: what else the shape says, such as "causal": shapes of one series make one line.
        tokens: tokens that one call processes or makes, 0 where it has none.
        skipped: name -> why it cannot run here.
        check: of what a call returned, its error and the error's limit; None where nothing checks.
    """

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    plain: Callable[[], Call]
    ours: Makers = field(default_factory=dict)
    peers: Makers = field(default_factory=dict)
    bytes_moved: int = 0
    flops: int = 0
    working_set: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    series: str = ""
    tokens: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    check: Callable[[Any], tuple[float, float]] | None = None

    @property
    def names(self) -> set[str]:
        """All that a row is made for."""
        return {BASELINE, *self.ours, *self.peers, *self.skipped}


def untimeable(impl: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why timing an implementation of an op here would fail or say nothing; None where it can be
    timed."""
    device = torch.device(device)
    reason = unavailable(impl, device.type, dtype)
    if reason is None and impl in ("triton", "cuda") and device.type != "cuda":
        where = "Triton's interpreter" if impl == "triton" else "the emulator"
        return f"it would run in {where}, whose time says nothing about the kernels"
    return reason
