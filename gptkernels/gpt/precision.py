"""The dtypes that a model can be trained and asked in, autocast to them, and logits without it."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.autocast import without_autocast
from gptkernels.gpt.generation.cache import CachingModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products are computed in `dtype`; in float32 it changes nothing."""
    narrow = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if narrow else None, enabled=narrow)


def full_logits(model: CachingModel, hidden: Tensor) -> Tensor:
    """Hidden states (..., C) of any dtype to fp32 logits (..., V), which the head computes in the
    dtype of the model's own weights whatever autocast says.

    Near -100 a bfloat16 has steps of 0.5: likely tokens would tie, and log-probabilities be wrong
    by tenths of a nat.
    """
    own = next(model.parameters()).dtype  # the embedding's; a quantised head has no parameter
    with without_autocast(hidden):
        return model.logits(hidden.to(own)).float()
