"""Speed of `gptkernels.layer_norm` against eager PyTorch.

LayerNorm is bound by memory, so the floor is the bytes that any implementation must move, over the
measured copy bandwidth. In tensors of x's size:

    forward                    read x; write y                                        2
    forward, residual          read x, residual; write s, y                           4
    + backward                 read dy, x; write dx                                   2 + 3
    + backward, residual       read dy, ds, s; write dx (the residual's gradient too) 4 + 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import gptkernels
from gptkernels.bench.cases.workload import Workload, normal
from gptkernels.truth import baseline

# (batch, tokens, width): GPT-2's widths at a training batch.
GPU_SHAPES = ((8, 1024, 768), (8, 1024, 1600), (4, 2048, 4096), (1, 2048, 12288))
CPU_SHAPES = ((1, 512, 768), (1, 512, 1600))
GPU_DTYPES = (torch.bfloat16, torch.float32)
_TENSORS_MOVED = {  # (residual, backward) -> tensors moved
    (False, False): 2,
    (True, False): 4,
    (False, True): 5,
    (True, True): 8,
}


def workloads(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, quick: bool
) -> Iterator[Workload]:
    """Each direction, without and with residual."""
    for residual in (False, True):
        for backward in (False, True):
            yield _workload(shape, dtype, device, residual=residual, backward=backward)


def _workload(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    residual: bool,
    backward: bool,
) -> Workload:
    width = shape[-1]
    draw = normal(device, dtype, requires_grad=backward)
    x, weight, bias = draw(*shape), draw(width), draw(width)
    added = draw(*shape) if residual else None

    def call(layer_norm: Callable[..., Any], **options: Any) -> Any:
        return layer_norm(x, weight, bias, residual=added, prenorm=residual, **options)

    size = "B{} T{} C{}".format(*shape)
    return Workload(
        shape=f"{size}{' +residual' if residual else ''}",
        plain=lambda: call(baseline.layer_norm),
        ours=lambda impl: call(gptkernels.layer_norm, impl=impl),
        bytes_moved=_TENSORS_MOVED[residual, backward] * x.numel() * x.element_size(),
        leaves=[leaf for leaf in (x, weight, bias, added) if leaf is not None],
        cotangent=draw(*shape).detach() if backward else None,
    )
