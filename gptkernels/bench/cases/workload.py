"""What each op's module describes, and how it becomes a case to time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.timing import Case, compared


@dataclass(frozen=True)
class Workload:
    """One op on one shape, forward or forward and backward.

    Args:
        shape: readable sizes, such as "B8 T1024 C768".
        plain: eager PyTorch's forward pass, with no arguments.
        ours: the op's forward pass, with `impl` as its only argument.
        bytes_moved: bytes that any implementation must read and write.
        flops: floating-point operations that any implementation must do, 0 where not counted.
        leaves: what the backward pass differentiates by.
        cotangent: the gradient of each output; None: the forward pass alone.
    """

    shape: str
    plain: Callable[[], Any]
    ours: Callable[[str], Any]
    bytes_moved: int
    flops: int = 0
    leaves: Sequence[Tensor] = ()
    cotangent: Tensor | None = None

    def case(self, op: str, dtype: torch.dtype, device: torch.device, impls: Sequence[str]) -> Case:
        """PyTorch and each of `impls`, on the same tensors."""
        candidates, skipped = compared(
            self._whole(self.plain),
            lambda impl: self._whole(functools.partial(self.ours, impl)),
            impls,
            device,
            dtype,
        )
        return Case(
            op=op,
            shape=self.shape,
            dtype=dtype,
            direction="forward" if self.cotangent is None else "forward+backward",
            candidates=candidates,
            bytes_moved=self.bytes_moved,
            flops=self.flops,
            skipped=skipped,
        )

    def _whole(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        """`forward`, and the backward pass behind it where one is wanted."""
        if self.cotangent is None:
            return forward

        def run() -> Any:
            outputs = forward()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, self.leaves, [self.cotangent] * len(outputs))

        return run


def normal(
    device: torch.device, dtype: torch.dtype, *, requires_grad: bool = False
) -> Callable[..., Tensor]:
    """A function of sizes, and a `scale` by name, that draws tensors of normal numbers; the same
    ones each time.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(sizes, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(requires_grad)

    return draw
