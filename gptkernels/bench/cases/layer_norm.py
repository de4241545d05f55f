"""Speed of `gptkernels.layer_norm` against eager PyTorch.

Both sides get the same tensors. LayerNorm is bound by memory, so the floor is the bytes that any
implementation must move, over the measured copy bandwidth. In tensors of x's size:

    forward                    read x; write y                                        2
    forward, residual          read x, residual; write s, y                           4
    + backward                 read dy, x; write dx                                   2 + 3
    + backward, residual       read dy, ds, s; write dx (the residual's gradient too) 4 + 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.timing import BASELINE, Case, untimeable
from gptkernels.bench.timing import rows as timed_rows
from gptkernels.truth import baseline

# (batch, tokens, width): GPT-2's widths at a training batch.
_GPU_SHAPES = ((8, 1024, 768), (8, 1024, 1600), (4, 2048, 4096), (1, 2048, 12288))
_CPU_SHAPES = ((1, 512, 768), (1, 512, 1600))
_TENSORS_MOVED = {  # (residual, backward) -> tensors moved
    (False, False): 2,
    (True, False): 4,
    (False, True): 5,
    (True, True): 8,
}


def rows(
    device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Timed rows of `cases`, as `timing.rows` describes them."""
    return timed_rows(cases(device, impls, quick), device=device, budget_s=0.3 if quick else 1.0)


def cases(device: torch.device | str, impls: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """Every shape, dtype, direction, with and without residual; `quick`: the first shape only."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    shapes = _GPU_SHAPES if on_gpu else _CPU_SHAPES
    dtypes = (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,)
    for shape in shapes[: 1 if quick else None]:
        for dtype in dtypes:
            for residual in (False, True):
                for backward in (False, True):
                    yield _case(device, impls, shape, dtype, residual=residual, backward=backward)


def _case(
    device: torch.device,
    impls: Sequence[str],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    residual: bool,
    backward: bool,
) -> Case:
    width = shape[-1]
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator).to(device=device, dtype=dtype)
        return values.requires_grad_(backward)

    x, weight, bias = draw(*shape), draw(width), draw(width)
    added = draw(*shape) if residual else None
    cotangent = torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    def call(layer_norm: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        wanted = [tensor for tensor in (x, weight, bias, added) if tensor is not None]

        def run() -> Any:
            outputs = layer_norm(x, weight, bias, residual=added, prenorm=residual, **options)
            if not backward:
                return outputs
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, wanted, [cotangent] * len(outputs))

        return run

    candidates = {BASELINE: call(baseline.layer_norm)}
    skipped = {}
    for impl in impls:
        reason = untimeable(impl, device, dtype)
        if reason is None:
            candidates[impl] = call(gptkernels.layer_norm, impl=impl)
        else:
            skipped[impl] = reason
    size = "B{} T{} C{}".format(*shape)
    return Case(
        op="layer_norm",
        shape=f"{size}{' +residual' if residual else ''}",
        dtype=dtype,
        direction="forward+backward" if backward else "forward",
        candidates=candidates,
        bytes_moved=_TENSORS_MOVED[residual, backward] * x.numel() * x.element_size(),
        skipped=skipped,
    )
