"""What the ops' autograd.Functions share: how they are called, and that they are differentiable
once.

A gradient comes from a kernel, so PyTorch cannot differentiate it again. A second derivative and
forward-mode AD are refused with an error (core/refusal.py); under the transforms of torch.func the
Functions are called by core/transforms.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gptkernels.core import transforms
from gptkernels.core.refusal import Gradients, once, refuse_tangents


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
    gradient. Raises NotImplementedError for tensors with a tangent."""
    refuse_tangents(*arguments)
    # What else watches PyTorch's calls, the registered ops that forward calls look for.
    if torch._C._are_functorch_transforms_active():
        return transforms.through(function, *arguments)
    if torch.compiler.is_exporting():
        # An exported graph has no autograd.Function: it is differentiated operator by operator.
        return function.forward(_NothingToSave(), *arguments)
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(arguments))
    if not requires_grad(arguments):
        return function.forward(_NothingToSave(), *arguments)
    # Function.apply itself first looks for leftovers of torch.func's transforms.
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorates a function (ctx, saved, *gradients), where saved is ctx.saved_tensors, as the
    backward of an autograd.Function. What it returns cannot be differentiated.

    PyTorch's own decorator refuses only what passes through the incoming gradients. The results
    depend on the saved tensors too: so does the second derivative of y.sum().
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Tensor | None) -> Gradients:
        refuse_tangents(*gradients)
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for a single reading
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            found = backward(ctx, saved, *gradients)
        return once(found, (*saved, *gradients))

    return refusing


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
