"""What each op's module describes, and how it becomes a case to time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.timing import Case

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Workload:
    """One op on one shape.

    Args:
        shape: readable sizes, such as "B8 T1024 C768".
        tensors: what the op takes, and the backward pass differentiates by; every output has the
            shape of the first one.
        plain: eager PyTorch's forward pass, of the tensors.
        ours: the op's forward pass, of the tensors, with `impl` by name.
        work: direction -> bytes that any implementation must read and write, and floating-point
            operations that it must do, 0 where not counted.
    """

    shape: str
    tensors: Sequence[Tensor]
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    work: dict[str, tuple[int, int]]

    def cases(self, op: str, impls: Sequence[str]) -> Iterator[Case]:
        """Each direction: PyTorch and each of `impls`, on the same tensors."""
        yield from (self._case(op, direction, impls) for direction in self.work)

    def _case(self, op: str, direction: str, impls: Sequence[str]) -> Case:
        called = self._forward if direction == FORWARD else self._both
        bytes_moved, flops = self.work[direction]
        return Case.beside(
            called(self.plain),
            lambda impl: called(functools.partial(self.ours, impl=impl)),
            impls,
            self.tensors[0].device,
            op=op,
            shape=self.shape,
            dtype=self.tensors[0].dtype,
            direction=direction,
            bytes_moved=bytes_moved,
            flops=flops,
        )

    def _forward(self, function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*self.tensors)

    def _both(self, function: Callable[..., Any]) -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in self.tensors]
        first = self.tensors[0]
        cotangent = normal(first.device, first.dtype, seed=1)(*first.shape)

        def run() -> Any:
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, leaves, [cotangent] * len(outputs))

        return run


def normal(device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Callable[..., Tensor]:
    """A function of sizes, and a `scale` by name, that draws tensors of normal numbers; the same
    ones each time.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    return draw
