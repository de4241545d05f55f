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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.cases.workload import BOTH, FORWARD, Workload, normal
from gptkernels.truth import baseline

# (batch, tokens, width): GPT-2's widths at a training batch.
GPU_SHAPES = ((8, 1024, 768), (8, 1024, 1600), (4, 2048, 4096), (1, 2048, 12288))
CPU_SHAPES = ((1, 512, 768), (1, 128, 768), (1, 1024, 768), (1, 512, 1600))
GPU_DTYPES = (torch.bfloat16, torch.float32)
CPU_DTYPES = (torch.float32, torch.bfloat16)


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
    yield Workload(size, tensors[:3], baseline.layer_norm, gptkernels.layer_norm, work)
    plain, ours = _added(baseline.layer_norm), _added(gptkernels.layer_norm)
    work = {FORWARD: (4 * moved, 0), BOTH: (8 * moved, 0)}
    yield Workload(f"{size} +residual", tensors, plain, ours, work)


def _added(layer_norm: Callable[..., Any]) -> Callable[..., Any]:
    """It takes the residual as its last tensor, and returns the sum too."""

    def added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **options: Any) -> Any:
        return layer_norm(x, weight, bias, residual=residual, prenorm=True, **options)

    return added
