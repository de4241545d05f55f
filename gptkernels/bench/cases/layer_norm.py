"""Speed of `gptkernels.layer_norm` against eager PyTorch.

LayerNorm is bound by memory, so the floor is the bytes that any implementation must move, over the
measured copy bandwidth. In tensors of x's size:

    forward                    read x; write y                                        2
    forward, residual          read x, residual; write s, y                           4
    + backward                 read dy, x; write dx                                   2 + 3
    + backward, residual       read dy, ds, s; write dx (the residual's gradient too) 4 + 4
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptkernels
from gptkernels.bench.cases.workload import BOTH, FORWARD, Workload, normal

# (batch, tokens, width): GPT-2's widths at a training batch.
GPU_SHAPES = ((8, 1024, 768), (8, 1024, 1600), (4, 2048, 4096), (1, 2048, 12288))
CPU_SHAPES = (
    (1, 512, 768),
    (1, 1, 768),
    (1, 8, 768),
    (1, 128, 768),
    (1, 1024, 768),
    (1, 512, 1600),
)
GPU_DTYPES = (torch.bfloat16, torch.float32)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """Without and with residual."""
    size = "B{} T{} C{}".format(*shape)
    width = shape[-1]
    draw = normal(device, dtype)
    tensors = [draw(*shape), draw(width), draw(width), draw(*shape)]
    moved = math.prod(shape) * dtype.itemsize
    work = {FORWARD: (2 * moved, 0), BOTH: (5 * moved, 0)}
    yield Workload(size, tensors[:3], _plain, gptkernels.layer_norm, work)
    work = {FORWARD: (4 * moved, 0), BOTH: (8 * moved, 0)}
    yield Workload(f"{size} +residual", tensors, _plain_added, _added, work)


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _plain_added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias), s


def _added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **options: Any) -> Any:
    return gptkernels.layer_norm(x, weight, bias, residual=residual, prenorm=True, **options)
