"""Speed of `gptkernels.gelu_mlp` against eager PyTorch.

Both sides get the same tensors. The block is bound by its products: M rows, width C, inner width F
make 2 products forward and 4 backward (da, dw2, dw1, dx), each of 2 M C F operations, and every
epilogue would ideally be free. Recomputation does one product more, which is not counted: it buys
memory, not results. Bytes, for a shape that memory limits, in tensors:

    forward                read x, w1, w2; write y
    + backward             write h; read dy, x, h, w1, w2; write dx, dw1, dw2
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

# (batch, tokens, width, inner): GPT-2's smallest and largest, and a 7B model's.
_GPU_SHAPES = ((8, 1024, 768, 3072), (8, 1024, 1600, 6400), (4, 2048, 4096, 16384))
_CPU_SHAPES = ((1, 128, 768, 3072),)


def rows(
    device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Timed rows of `cases`, as `timing.rows` describes them."""
    return timed_rows(cases(device, impls, quick), device=device, budget_s=0.3 if quick else 1.0)


def cases(device: torch.device | str, impls: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """Every shape, dtype and direction, backward also with recomputation; `quick`: one shape."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    shapes = _GPU_SHAPES if on_gpu else _CPU_SHAPES
    dtypes = (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,)
    for shape in shapes[: 1 if quick else None]:
        for dtype in dtypes:
            yield _case(device, impls, shape, dtype, backward=False, recompute=False)
            yield _case(device, impls, shape, dtype, backward=True, recompute=False)
            if not quick:
                yield _case(device, impls, shape, dtype, backward=True, recompute=True)


def _case(
    device: torch.device,
    impls: Sequence[str],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    backward: bool,
    recompute: bool,
) -> Case:
    batch, tokens, width, inner = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator) * scale
        return values.to(device=device, dtype=dtype).requires_grad_(backward)

    parameters = (
        draw(batch, tokens, width),
        draw(inner, width, scale=width**-0.5),
        draw(inner),
        draw(width, inner, scale=inner**-0.5),
        draw(width),
    )
    cotangent = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)

    def call(gelu_mlp: Callable[..., Tensor], **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            y = gelu_mlp(*parameters, **options)
            return torch.autograd.grad(y, parameters, cotangent) if backward else y

        return run

    candidates = {BASELINE: call(baseline.gelu_mlp)}
    skipped = {}
    for impl in impls:
        reason = untimeable(impl, device, dtype)
        if reason is None:
            candidates[impl] = call(gptkernels.gelu_mlp, impl=impl, recompute=recompute)
        else:
            skipped[impl] = reason
    rows = batch * tokens
    weights = 2 * width * inner
    forward_elements = weights + 2 * rows * width + (rows * inner if backward else 0)
    backward_elements = 2 * weights + 3 * rows * width + rows * inner
    elements = forward_elements + (backward_elements if backward else 0)
    products = 6 if backward else 2
    return Case(
        op="gelu_mlp",
        shape=f"B{batch} T{tokens} C{width} F{inner}{' recompute' if recompute else ''}",
        dtype=dtype,
        direction="forward+backward" if backward else "forward",
        candidates=candidates,
        bytes_moved=elements * dtype.itemsize,
        flops=products * 2 * rows * width * inner,
        skipped=skipped,
    )
