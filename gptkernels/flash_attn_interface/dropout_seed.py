"""The seed of a call that is about to be made.

`gptkernels.attention` and `layer_norm` draw the seed of their dropout from PyTorch's generator. The
mask is a function of the seed (`gptkernels.core.philox`), so whoever draws the same number knows
the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core import philox


def upcoming(device: torch.device) -> Tensor:
    """(seed, offset), int64[2], that the next call with dropout on `device` draws."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        return philox.draw(device)
