"""The dtypes that a model can be trained and asked in, and autocast to them."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products are computed in `dtype`; in float32 it changes nothing."""
    narrow = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if narrow else None, enabled=narrow)
