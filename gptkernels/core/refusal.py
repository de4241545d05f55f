"""What the ops refuse: derivatives that their kernels do not have. Dropping them in silence would
leave a wrong gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function, forward_ad

Gradients = tuple[Tensor | None, ...]

ONCE = (
    "the ops of gptkernels are differentiable once, by backpropagation: for a second derivative or "
    "forward-mode AD, compute with PyTorch's own operators"
)


def refuse_tangents(*arguments: Any) -> None:
    """Raises NotImplementedError if a tensor among the arguments is a dual of forward-mode AD."""
    if forward_ad._current_level >= 0:
        tensors = (x for x in arguments if isinstance(x, Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(ONCE)


def once(found: Gradients, given: tuple[Any, ...], why: str = ONCE) -> Gradients:
    """Returns `found`, which was computed from `given`. To differentiate it raises
    NotImplementedError, and says why."""
    return _Refusal.apply(why, len(found), *found, *given)


class _Refusal(Function):
    """Passes the first `count` tensors on. The others are what they depend on. To differentiate is
    an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(why: str, count: int, *tensors: Tensor | None) -> Gradients:
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Gradients:
        raise NotImplementedError(ctx.why)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Gradients:
        raise NotImplementedError(ctx.why)
