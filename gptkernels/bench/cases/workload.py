"""What each op's module describes, and how it becomes cases to time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.case import BACKWARD, FORWARD, Call, Case, untimeable
from gptkernels.bench.peers.compiled import repeatable
from gptkernels.truth import parity
from gptkernels.truth.yardstick import FullSums

# A function of the workload's tensors: the op's forward pass.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """A part of a workload whose truth takes little: some rows, some queries.

    Args:
        tensors: the workload's tensors, as far as the part needs them.
        truth, yardstick: the op on them, in fp64 and in plain PyTorch.
        of_output: cuts the part from an output of the whole.
        of_gradient: cuts from the gradient of each tensor what the part alone gives; None for a
            tensor whose gradient needs the rest too.
        of_own: the same for gradients that were computed of the part.
    """

    tensors: Sequence[Tensor]
    truth: Function
    yardstick: Function
    of_output: Callable[[Tensor], Tensor]
    of_gradient: Sequence[Callable[[Tensor], Tensor] | None]
    of_own: Sequence[Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True)
class Workload:
    """One op on one shape.

    Args:
        shape: readable sizes, such as "B8 T1024 C768".
        sizes, series: as of `Case`.
        tensors: what the op takes, and the backward pass differentiates by; every output has the
            shape of the first one, or is a loss, a scalar or one a row.
        plain: eager PyTorch's forward pass, of the tensors.
        ours: the op's forward pass, of the tensors, with `impl` by name.
        work: direction -> bytes that any implementation must read and write, and floating-point
            operations that it must do, 0 where not counted.
        peers: of whether the result is to be differentiated, and its backward pass to be called
            again and again: name -> what makes a forward pass.
        part: what is checked; None: nothing.
    """

    shape: str
    tensors: Sequence[Tensor]
    plain: Function
    ours: Function
    work: dict[str, tuple[int, int]]
    sizes: dict[str, int] = field(default_factory=dict)
    series: str = ""
    peers: Callable[[bool, bool], Mapping[str, Callable[[], Function]]] = lambda *_: {}
    part: Part | None = None

    def cases(self, op: str, impls: Sequence[str]) -> Iterator[Case]:
        """Each direction: PyTorch, each of `impls`, and the peers, on the same tensors."""
        yield from (self._case(op, direction, impls) for direction in self.work)

    def _case(self, op: str, direction: str, impls: Sequence[str]) -> Case:
        dtype, device = self.tensors[0].dtype, self.tensors[0].device
        called = functools.partial(call, tensors=self.tensors, direction=direction)
        reasons = {impl: untimeable(impl, device, dtype) for impl in impls}
        runnable = [impl for impl, reason in reasons.items() if reason is None]
        bytes_moved, flops = self.work[direction]
        return Case(
            op=op,
            shape=self.shape,
            dtype=dtype,
            direction=direction,
            plain=lambda: called(self.plain),
            ours={
                impl: functools.partial(called, functools.partial(self.ours, impl=impl))
                for impl in runnable
            },
            peers={
                name: functools.partial(_made, make, self.tensors, direction)
                for name, make in self.peers(direction != FORWARD, direction == BACKWARD).items()
            },
            bytes_moved=bytes_moved,
            flops=flops,
            sizes=self.sizes,
            series=self.series,
            skipped={impl: reason for impl, reason in reasons.items() if reason is not None},
            check=None if self.part is None else self._check(direction, self.part),
        )

    def _check(self, direction: str, part: Part) -> Callable[[Any], tuple[float, float]]:
        @functools.cache
        def expected() -> tuple[list[Tensor], list[Tensor]]:
            """Of plain PyTorch, and in fp64."""
            cotangents = [part.of_output(c) for c in _cotangents(self.tensors)]
            with FullSums():
                plain = _results(part, part.yardstick, part.tensors, cotangents, direction)
            wide = [x.double() for x in part.tensors]
            return plain, _results(part, part.truth, wide, cotangents, direction)

        def check(result: Any) -> tuple[float, float]:
            """Of the tensor that is nearest to its limit, or furthest beyond."""
            if direction == FORWARD:
                k, found = parity.K_FORWARD, [part.of_output(x) for x in listed(result)]
            else:
                k, found = parity.K_GRADIENT, _cut(result, part.of_gradient)
            measured = [
                parity.compare(mine, plain, truth, k=k)
                for mine, plain, truth in zip(found, *expected(), strict=True)
            ]
            worst = max(measured, key=lambda m: m.error / m.limit if m.limit else m.error)
            return worst.error, worst.limit

        return check


def call(function: Function, tensors: Sequence[Tensor], direction: str) -> Call:
    """A call of the function on the tensors in one direction: forward, where no gradient is wanted;
    the backward pass alone, behind one forward pass; or both. The latter two return the gradients
    of all tensors."""
    if direction == FORWARD:
        return lambda: function(*tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    cotangents = _cotangents(tensors)

    def gradients(outputs: list[Tensor], keep: bool) -> tuple[Tensor, ...]:
        given = _given(cotangents, outputs)
        return torch.autograd.grad(outputs, leaves, given, retain_graph=keep)

    if direction == BACKWARD:
        with repeatable():
            outputs = listed(function(*leaves))

        def repeated() -> tuple[Tensor, ...]:
            with repeatable():
                return gradients(outputs, True)

        return repeated
    return lambda: gradients(listed(function(*leaves)), False)


def _made(make: Callable[[], Function], tensors: Sequence[Tensor], direction: str) -> Call:
    return call(make(), tensors, direction)


def _results(
    part: Part,
    function: Function,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    direction: str,
) -> list[Tensor]:
    if direction == FORWARD:
        return listed(function(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = listed(function(*leaves))
    found = torch.autograd.grad(outputs, leaves, _given(cotangents, outputs))
    return _cut(found, part.of_own)


def _cut(
    gradients: Sequence[Tensor], cuts: Sequence[Callable[[Tensor], Tensor] | None]
) -> list[Tensor]:
    pairs = zip(gradients, cuts, strict=True)
    return [cut(gradient) for gradient, cut in pairs if cut is not None]


def _cotangents(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of an op's outputs: of two, if it has so many."""
    first = tensors[0]
    return [normal(first.device, first.dtype, seed=seed)(*first.shape) for seed in (1, 2)]


def _given(cotangents: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of the outputs; 1 for a loss."""
    return [
        c.to(y.dtype) if y.dim() else torch.ones_like(y)
        for c, y in zip(cotangents, outputs, strict=False)
    ]


def listed(outputs: Any) -> list[Tensor]:
    """One output, or several, as a list."""
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, as a cut of a `Part`."""
    return x


def normal(device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Callable[..., Tensor]:
    """A function of sizes, and a `scale` by name, that draws tensors of normal numbers; the same
    ones each time.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    return draw
