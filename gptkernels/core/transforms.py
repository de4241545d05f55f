"""The ops under the transforms of torch.func: grad, vjp, jacrev, and vmap around and inside them.

torch.func wants an autograd.Function whose forward pass takes no ctx and returns whatever the
backward pass reads, so that it can wrap and batch these tensors too. `through` makes one of any
Function of the ops: it runs the op's forward pass with a ctx that only takes notes, and returns the
tensors that were saved as further results. Inside, each registered op meets its rule for vmap
(core/vmap.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._compile import _disable_dynamo
from torch.autograd import Function

from gptkernels.core.refusal import ONCE, Gradients


def through(function: type[Function], *arguments: Any) -> Any:
    """Returns what function.apply(*arguments) would return, under the active transforms. Raises
    NotImplementedError where torch.compile traces it."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.compile cannot trace the ops of gptkernels under a transform of torch.func: "
            "transform and call them in eager mode"
        )
    notes = _Notes(tuple(_needs_gradient(argument) for argument in arguments))
    results = _applied(function, notes, *arguments)[: notes.results]
    return results if notes.several else results[0]


def batched(tensor: Any) -> bool:
    """Whether some vmap that is active has `tensor` in its batch: it has no values or strides of
    its own then."""
    if torch.compiler.is_compiling():
        return False
    return any(_functorch.is_batchedtensor(level) for level in _levels(tensor))


# What torch.compile cannot trace as a whole it would trace in parts, each with a part of a
# transform.
@_disable_dynamo
def _applied(*arguments: Any) -> Any:
    return _Split.apply(*arguments)


def _needs_gradient(argument: Any) -> bool:
    return isinstance(argument, Tensor) and any(x.requires_grad for x in _levels(argument))


def _levels(tensor: Any) -> Iterator[Any]:
    """Yields a tensor, and what each transform has wrapped."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


class _Notes:
    """The ctx of an op's forward pass, whose attributes the backward pass will read.

    results: how many tensors the op returns; several: whether in a tuple. places: where each tensor
    that was saved is among the arguments, the results and what `place` returns; None for no tensor.
    """

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = needs_input_grad
        self.results, self.several = 0, False
        self.places: list[int | None] = []
        self.tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """The ops' backward passes take None, and zeros as well."""

    def place(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Tensor]:
        """Returns what was saved of no argument and no result, and remembers the places."""
        known = [id(x) for x in (*arguments, *results)]
        more: list[Tensor] = []
        self.places = []
        for tensor in self.tensors:
            if tensor is not None and id(tensor) not in known:
                known.append(id(tensor))
                more.append(tensor)
            self.places.append(None if tensor is None else known.index(id(tensor)))
        self.tensors = ()
        return more


class _Split(Function):
    """An op's Function as one of torch.func: returns the op's results, then what else it saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Any, notes: _Notes, *arguments: Any) -> tuple[Tensor, ...]:
        found = function.forward(notes, *arguments)
        notes.several = isinstance(found, tuple)
        results = found if notes.several else (found,)
        notes.results = len(results)
        return *results, *notes.place(arguments, results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        function, notes, *arguments = inputs
        # A second derivative, which is refused, is seen by the arguments and results themselves.
        ctx.mark_non_differentiable(*output[notes.results :])
        known = (*arguments, *output)
        ctx.save_for_backward(*(None if i is None else known[i] for i in notes.places))
        ctx.function, ctx.notes = function, notes
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        read = SimpleNamespace(**vars(ctx.notes), saved_tensors=_living(ctx.saved_tensors))
        read.needs_input_grad = ctx.needs_input_grad[2:]
        results = _living(gradients[: ctx.notes.results])
        return None, None, *ctx.function.backward(read, *results)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Gradients:
        raise NotImplementedError(ONCE)


def _living(tensors: Sequence[Tensor | None]) -> Gradients:
    """The tensors without what a transform that has ended wrapped them in: torch.func.vjp's second
    function is called then."""
    return tuple(None if t is None else _functorch.unwrap_if_dead(t) for t in tensors)
