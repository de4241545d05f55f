"""The product in front of PyTorch's attention, whose one weight makes queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """q, k and v, each (..., H, D), of a module with in_proj_weight, in_proj_bias and num_heads, as
    nn.MultiheadAttention has them. One product where the three inputs are one tensor."""
    weight, bias, heads = module.in_proj_weight, module.in_proj_bias, module.num_heads
    if query is key is value:
        return list(F.linear(query, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3))
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    given = zip((query, key, value), weight.chunk(3), biases, strict=True)
    return [F.linear(*one).unflatten(-1, (heads, -1)) for one in given]
