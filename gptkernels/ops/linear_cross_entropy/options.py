"""The options of `linear_cross_entropy` as one record: the public function fills it, and every
implementation reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """The numbers of a call."""

    ignore_index: int = -100  # a row with this target does not count
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # the factor of lse^2
    softcap: float = 0.0  # 0: no softcap


def counted(targets: Tensor, classes: int, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Of targets (N,): which rows count, and which of those have a target that is no class; both
    (N,) bool."""
    counts = targets != options.ignore_index
    return counts, counts & ((targets < 0) | (targets >= classes))
