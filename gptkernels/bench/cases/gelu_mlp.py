"""Speed of `gptkernels.gelu_mlp` against eager PyTorch.

The block is bound by its products: M rows, width C, inner width F make 2 products forward and 4
backward (da, dw2, dw1, dx), each of 2 M C F operations, and every epilogue would ideally be free.
Recomputation does one product more, which is not counted: it buys memory, not results. Bytes, for a
shape that memory limits, in tensors:

    forward                read x, w1, w2; write y
    + backward             write h; read dy, x, h, w1, w2; write dx, dw1, dw2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gptkernels
from gptkernels.bench.cases.workload import Workload, normal
from gptkernels.truth import baseline

# (batch, tokens, width, inner): GPT-2's smallest and largest, and a 7B model's.
GPU_SHAPES = ((8, 1024, 768, 3072), (8, 1024, 1600, 6400), (4, 2048, 4096, 16384))
CPU_SHAPES = ((1, 128, 768, 3072),)
GPU_DTYPES = (torch.bfloat16, torch.float32)


def workloads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """Each direction, backward also with recomputation unless `quick`."""
    yield _workload(shape, dtype, device, backward=False, recompute=False)
    yield _workload(shape, dtype, device, backward=True, recompute=False)
    if not quick:
        yield _workload(shape, dtype, device, backward=True, recompute=True)


def _workload(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
    recompute: bool,
) -> Workload:
    batch, tokens, width, inner = shape
    draw = normal(device, dtype, requires_grad=backward)
    tensors = (
        draw(batch, tokens, width),
        draw(inner, width, scale=width**-0.5),
        draw(inner),
        draw(width, inner, scale=inner**-0.5),
        draw(width),
    )
    rows = batch * tokens
    weights = 2 * width * inner
    forward_elements = weights + 2 * rows * width + (rows * inner if backward else 0)
    backward_elements = 2 * weights + 3 * rows * width + rows * inner
    elements = forward_elements + (backward_elements if backward else 0)
    products = 6 if backward else 2
    return Workload(
        shape=f"B{batch} T{tokens} C{width} F{inner}{' recompute' if recompute else ''}",
        plain=lambda: baseline.gelu_mlp(*tensors),
        ours=lambda impl: gptkernels.gelu_mlp(*tensors, impl=impl, recompute=recompute),
        bytes_moved=elements * dtype.itemsize,
        flops=products * 2 * rows * width * inner,
        leaves=tensors,
        cotangent=draw(batch, tokens, width).detach() if backward else None,
    )
