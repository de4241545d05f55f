"""In which dtypes cases are timed, by device and level; in brief in bf16 alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BOTH = (torch.bfloat16, torch.float32)


def both(device_type: str, level: str) -> Sequence[torch.dtype]:
    """On any device."""
    return _BOTH[: 1 if level == "quick" else None]


def narrow_on_a_gpu(device_type: str, level: str) -> Sequence[torch.dtype]:
    """For what runs in fp32 on a CPU alone: fused attention, and whole models."""
    return _BOTH[:1] if device_type == "cuda" else both(device_type, level)
