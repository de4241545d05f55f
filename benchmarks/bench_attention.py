"""Speed of `gptkernels.attention` against eager PyTorch.

Both sides get the same tensors. Forward is two products of 2 B H T T D operations each, halved
where causal; backward counts two and a half times that. Bytes, in tensors (B, T, H, D):

    forward                read q, k, v; write out
    + backward             read q, k, v, out, dout; write dq, dk, dv
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels import baseline

from .timing import BASELINE, Case, untimeable
from .timing import rows as timed_rows

# (batch, tokens, heads, key heads, head width): GPT-2, a 7B model, grouped heads at length.
_GPU_SHAPES = ((8, 1024, 12, 12, 64), (2, 4096, 32, 32, 128), (1, 8192, 64, 8, 128))
_CPU_SHAPES = ((1, 256, 12, 12, 64), (1, 256, 12, 4, 64))


def rows(
    device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """Timed rows of `cases`, as `timing.rows` describes them."""
    return timed_rows(cases(device, impls, quick), device=device, budget_s=0.3 if quick else 1.0)


def cases(device: torch.device | str, impls: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """Every shape and direction, causal and not; `quick`: one shape, causal."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for shape in (_GPU_SHAPES if on_gpu else _CPU_SHAPES)[: 1 if quick else None]:
        for causal in (True,) if quick else (True, False):
            for backward in (False, True):
                yield _case(device, impls, shape, dtype, causal=causal, backward=backward)


def _case(
    device: torch.device,
    impls: Sequence[str],
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool,
    backward: bool,
) -> Case:
    batch, tokens, heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        values = torch.randn(batch, tokens, heads, width, generator=generator)
        return values.to(device=device, dtype=dtype)

    q, k, v = (draw(n).requires_grad_(backward) for n in (heads, key_heads, key_heads))
    cotangent = draw(heads)

    def call(attention: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            out = attention(q, k, v, causal=causal, **options)
            return torch.autograd.grad(out, (q, k, v), cotangent) if backward else out

        return run

    candidates = {BASELINE: call(baseline.attention)}
    skipped = {}
    for impl in impls:
        reason = untimeable(impl, device, dtype)
        if reason is None:
            candidates[impl] = call(gptkernels.attention, impl=impl)
        else:
            skipped[impl] = reason
    products = 4 * batch * heads * tokens * tokens * width * (3.5 if backward else 1.0)
    # q, out and dout are as large, k and v smaller where heads share them.
    tensors = (6 * q.numel() + 6 * k.numel()) if backward else 2 * (q.numel() + k.numel())
    return Case(
        op="attention",
        shape=f"B{batch} T{tokens} H{heads}/{key_heads} D{width}{' causal' if causal else ''}",
        dtype=dtype,
        direction="forward+backward" if backward else "forward",
        candidates=candidates,
        bytes_moved=tensors * q.element_size(),
        flops=int(products / 2 if causal else products),
        skipped=skipped,
    )
