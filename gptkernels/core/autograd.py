"""What the ops' autograd.Functions share: how they are called, and that they are differentiable
once.

A gradient comes from a kernel, so PyTorch cannot differentiate it again. A second derivative,
forward-mode AD and the transforms of torch.func are refused with an error: dropping them in silence
would leave a wrong gradient. Under torch.compile PyTorch decides, and may drop some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

_Gradients = tuple[Tensor | None, ...]

_ONCE = (
    "the ops of gptkernels are differentiable once, by backpropagation: for a second derivative, "
    "forward-mode AD or a transform of torch.func, compute with PyTorch's own operators"
)


class _NothingToSave:
    """The ctx of a forward pass that nobody will differentiate."""

    needs_input_grad = (False,) * 32

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Called by a forward pass, to no effect."""

    def set_materialize_grads(self, value: bool) -> None:
        """Called by a forward pass, to no effect."""


def requires_grad(arguments: Iterable[Any]) -> bool:
    """Whether a result will have a gradient."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def apply(function: type[Function], *arguments: Any) -> Any:
    """Returns function.apply(*arguments), or function.forward's result where no argument requires a
    gradient. Raises NotImplementedError under a transform of torch.func, and for tensors with a
    tangent."""
    # What else watches PyTorch's calls, the registered ops that forward calls look for.
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_ONCE)
    refuse_tangents(*arguments)
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(arguments))
    if not requires_grad(arguments):
        return function.forward(_NothingToSave(), *arguments)
    # Function.apply itself first looks for leftovers of torch.func's transforms.
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Decorates a function (ctx, saved, *gradients), where saved is ctx.saved_tensors, as the
    backward of an autograd.Function. What it returns cannot be differentiated.

    PyTorch's own decorator refuses only what passes through the incoming gradients. The results
    depend on the saved tensors too: so does the second derivative of y.sum().
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Tensor | None) -> _Gradients:
        refuse_tangents(*gradients)
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for a single reading
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            found = backward(ctx, saved, *gradients)
        return _Refusal.apply(len(found), *found, *saved, *gradients)

    return refusing


def refuse_tangents(*arguments: Any) -> None:
    """Raises NotImplementedError if a tensor among the arguments is a dual of forward-mode AD."""
    if forward_ad._current_level >= 0:
        tensors = (x for x in arguments if isinstance(x, Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(_ONCE)


def _distinct(arguments: Sequence[Any]) -> list[Any]:
    """Returns the arguments with a view in place of a tensor that was there before. Dynamo refuses
    the same tensor twice; autograd adds up the gradients of the views."""
    seen: list[Tensor] = []
    distinct = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if any(argument is other for other in seen):
                argument = argument.view_as(argument)
            seen.append(argument)
        distinct.append(argument)
    return distinct


class _Refusal(Function):
    """Passes the first `count` tensors on. The others are what they depend on. To differentiate is
    an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> _Gradients:
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> _Gradients:
        raise NotImplementedError(_ONCE)
