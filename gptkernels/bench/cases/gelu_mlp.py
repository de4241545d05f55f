"""Speed of `gptkernels.gelu_mlp` against eager PyTorch.

The block is bound by its products: M rows, width C, inner width F make 2 products forward and 4
backward (da, dw2, dw1, dx), each of 2 M C F operations, and every epilogue would ideally be free.
Recomputation does one product more, which is not counted: it buys memory, not results. It stands
beside a plain block under torch.utils.checkpoint, which does two more. Bytes, for a
shape that memory limits, in tensors:

    forward                read x, w1, w2; write y
    + backward             write h; read dy, x, h, w1, w2; write dx, dw1, dw2
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gptkernels
from gptkernels.bench.cases.workload import BOTH, FORWARD, Workload, normal
from gptkernels.truth import baseline

# (batch, tokens, width, inner): GPT-2's smallest and largest, and a 7B model's.
GPU_SHAPES = ((8, 1024, 768, 3072), (8, 1024, 1600, 6400), (4, 2048, 4096, 16384))
CPU_SHAPES = (
    (1, 128, 768, 3072),
    (1, 1, 768, 3072),
    (1, 8, 768, 3072),
    (1, 512, 768, 3072),
    (1, 1024, 768, 3072),
)
GPU_DTYPES = (torch.bfloat16, torch.float32)
CPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """One that keeps the pre-activation; unless `quick`, one that computes it again."""
    batch, tokens, width, inner = shape
    draw = normal(device, dtype)
    tensors = (
        draw(batch, tokens, width),
        draw(inner, width, scale=width**-0.5),
        draw(inner),
        draw(width, inner, scale=inner**-0.5),
        draw(width),
    )
    rows, weights = batch * tokens, 2 * width * inner
    product = 2 * rows * width * inner
    forward = weights + 2 * rows * width
    backward = rows * inner + 2 * weights + 3 * rows * width + rows * inner
    work = {
        FORWARD: (forward * dtype.itemsize, 2 * product),
        BOTH: ((forward + backward) * dtype.itemsize, 6 * product),
    }
    size = f"B{batch} T{tokens} C{width} F{inner}"
    yield Workload(size, tensors, baseline.gelu_mlp, gptkernels.gelu_mlp, work)
    if not quick:
        recomputing = functools.partial(gptkernels.gelu_mlp, recompute=True)
        both = {BOTH: work[BOTH]}
        yield Workload(f"{size} recompute", tensors, _checkpointed, recomputing, both)


def _checkpointed(*tensors: Tensor) -> Any:
    return checkpoint(baseline.gelu_mlp, *tensors, use_reentrant=False)
