"""A language model's head, whose logits wait: a loss that is computed of them needs none in memory.

In training, the swapped head returns `Logits`, a tensor that knows hidden states and weight.
F.cross_entropy of it is `gptkernels.linear_cross_entropy`, in whatever model or training loop that
is called; so is that of some of the rows, and of them in another shape or in float32, as
transformers' models and nanoGPT's form make them. For anything else the logits are computed, then
and there, and all goes on as without this package.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gptkernels.core.autocast import autocast_dtype, autocast_enabled
from gptkernels.core.autograd import apply, once_differentiable, requires_grad
from gptkernels.core.checks import DTYPES
from gptkernels.core.choice import choose
from gptkernels.core.direct import direct
from gptkernels.dropin.linear import Linear
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match
from gptkernels.nn.plain import original_class
from gptkernels.ops.linear_cross_entropy.op import linear_cross_entropy

# What the tensor itself answers.
_FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cpu", "is_cuda")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}
# What keeps the order of the rows.
_SHAPES = frozenset(
    {Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten, Tensor.contiguous}
)
# What asks for the logits' gradient.
_GRAD: Any = Tensor.grad
_WATCHES = frozenset({Tensor.retain_grad, Tensor.register_hook, _GRAD.__get__, torch.autograd.grad})


@dataclass(eq=False)
class _Call:
    """A call of a head."""

    hidden: Tensor  # (..., C)
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    impl: str
    dtype: torch.dtype  # what it computes in
    autocast: bool
    passed: bool = False  # whether a loss was computed whose gradients pass the logits by

    def __post_init__(self) -> None:
        self._versions = self._count()

    def _count(self) -> list[int]:
        """How often the tensors were changed in place."""
        return [t._version for t in (self.hidden, self.weight, self.bias) if t is not None]

    def check(self) -> None:
        """Raises RuntimeError where the tensors are no longer what they were."""
        if self._count() != self._versions:
            raise RuntimeError(
                "the logits of this model's head are computed when they are needed, and the "
                "weights, or the hidden states, have changed since, by an optimizer's step say: "
                "look at them before, or call gptkernels.accelerate(model, losses=False)"
            )

    def as_then(self) -> Any:
        """A context with autocast as it was."""
        return torch.autocast(self.hidden.device.type, self.dtype, enabled=self.autocast)

    def logits(self) -> Tensor:
        """What the head would have returned."""
        self.check()
        with self.as_then():
            return F.linear(self.hidden, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """What `Logits` are to autograd, should they come to it as they are: F.linear's result."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: _Call,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.as_then = call.as_then
        made: Tensor = Tensor._make_wrapper_subclass(
            Logits, (*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device=hidden.device
        )
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Any], dlogits: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        given: list[Any] = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(saved, wanted, strict=True)
        ]
        with torch.enable_grad(), ctx.as_then():
            y = F.linear(*given)
        leaves = [t for t, need in zip(given, wanted, strict=True) if need]
        found = iter(torch.autograd.grad(y, leaves, dlogits.to(y.dtype)))
        return (*(next(found) if need else None for need in wanted), None, None)


class Logits(Tensor):
    """The logits (..., V) of hidden states (..., C), in `dtype`, that nobody has looked at. Those
    that are made of others, in another shape say, may be the same memory, as PyTorch's are: all are
    computed when one of them is."""

    _call: _Call
    _hidden: Tensor
    _shape: Tensor  # on "meta": shape, strides and dtype
    _parent: Logits | None
    _made: list[tuple[weakref.ref[Logits], Callable[[Tensor], Tensor]]]  # of these, and how
    _found: Tensor | None

    @staticmethod
    def of(call: _Call, hidden: Tensor, shape: Tensor, parent: Logits | None = None) -> Logits:
        """Logits of hidden states that are those of the call, or some of them; `shape` is as they
        would be, on "meta"."""
        self: Logits = apply(_Linear, hidden, call.weight, call.bias, call, shape.dtype)
        self._call, self._hidden, self._shape, self._parent = call, hidden, shape, parent
        self._made, self._found = [], None
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What a function of PyTorch gives that got such a tensor."""
        kwargs = kwargs or {}
        if func in _WATCHES:
            tree_map(_check_watched, (tuple(args), dict(kwargs)))
        if args and isinstance(args[0], Logits):
            with torch._C.DisableTorchFunctionSubclass():
                if func in _FACTS:
                    return func(*args, **kwargs)
            found = args[0]._unseen(func, args[1:], kwargs)
            if found is not None:
                return found
        args, kwargs = tree_map(_seen, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls that come from C++, below autograd: of an autograd.Function's arguments, say."""
        if func._schema.is_mutable:
            raise NotImplementedError(
                f"{func} got the logits of a head that gptkernels.accelerate swapped before they "
                "were computed; call gptkernels.accelerate(model, losses=False)"
            )
        args, kwargs = tree_map(_values, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _unseen(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The result where it needs no logits in memory; else None."""
        if self._found is not None:
            return None
        if func is F.cross_entropy:
            return self._loss(*args, **kwargs)
        if not torch.is_grad_enabled():  # what is made now has no gradient
            return None
        if func is Tensor.float or (func is Tensor.to and args == (torch.float32,) and not kwargs):
            return self._make(self._hidden, self._shape.float(), Tensor.float)
        if func in _SHAPES or (func is Tensor.__getitem__ and _cuts(args[0])):
            return self._cut(func, args, kwargs)
        return None

    def _cut(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Logits | None:
        """Other shapes, and some of the rows, each with all of its logits."""
        self._call.check()  # the rows may be copied now
        with torch._C.DisableTorchFunctionSubclass():
            whole, width = self._shape, self._hidden.shape[-1]
            try:
                cut = func(whole, *args, **kwargs)
                if cut.dim() == 0 or cut.shape[-1] != whole.shape[-1] or cut.dtype != whole.dtype:
                    return None
                wanted = (*cut.shape[:-1], width)
                if func is Tensor.__getitem__:
                    hidden = self._hidden[args[0]]
                    if hidden.shape != wanted:
                        return None
                elif cut.numel() == 0:
                    return None
                else:
                    hidden = self._hidden.reshape(wanted)
            except (TypeError, ValueError, RuntimeError, IndexError):  # let the logits raise it
                return None
        return self._make(hidden, cut, lambda found: func(found, *args, **kwargs))

    def _make(self, hidden: Tensor, shape: Tensor, how: Callable[[Tensor], Tensor]) -> Logits:
        """Logits that `how` makes of these."""
        made = Logits.of(self._call, hidden, shape, self)
        self._made.append((weakref.ref(made), how))
        return made

    def _loss(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """F.cross_entropy of the logits; None where the op does not take such targets or options:
        PyTorch does, or has an error to raise."""
        if not (
            weight is size_average is reduce is None
            and type(target) is Tensor
            and self._hidden.dim() == 2  # of more, dimension 1 has the classes
        ):
            return None
        call = self._call
        call.check()
        try:
            with call.as_then():
                loss = linear_cross_entropy(
                    self._hidden, call.weight, target, bias=call.bias, ignore_index=ignore_index,
                    label_smoothing=label_smoothing, reduction=reduction, impl=call.impl,
                )  # fmt: skip
        except (TypeError, ValueError):
            return None
        call.passed |= loss.requires_grad
        autocast = torch.is_autocast_enabled(target.device.type)
        return loss if autocast else loss.to(self._shape.dtype)

    def _logits(self) -> Tensor:
        """The logits themselves, with their graph."""
        if self._found is None:
            if self._parent is not None:
                self._parent._logits()
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    self._keep(self._call.logits())
        return cast("Tensor", self._found)

    def _keep(self, found: Tensor) -> None:
        """Holds the logits, and those of all that were made of them."""
        self._found = found
        for reference, how in self._made:
            made = reference()
            if made is not None:
                made._keep(how(found))
        self._made.clear()


def _check_watched(value: Any) -> None:
    if isinstance(value, Logits) and value._call.passed:
        raise RuntimeError(
            "a loss of these logits was computed before: it has no gradient of them. Hook them "
            "first, or call gptkernels.accelerate(model, losses=False)"
        )


def _seen(value: Any) -> Any:
    return value._logits() if isinstance(value, Logits) else value


def _values(value: Any) -> Any:
    return value._logits().detach() if isinstance(value, Logits) else value


def _cuts(index: Any) -> bool:
    """Whether an index takes some of the rows, without tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is Ellipsis or (isinstance(part, int | slice) and not isinstance(part, bool))
        for part in parts
    )


class Head(Linear):
    """The linear layer that makes logits; rows are few in generation, and in training wait for the
    loss."""

    what = "logits with their cross-entropy; few rows (generation)"

    def forward(self, *given: Any, **named: Any) -> Any:
        """x (..., C) -> logits (..., V)."""
        if len(given) == 1 and not named and self._waits(given[0]):
            x = given[0]
            impl, dtype, autocast = self._gptkernels.impl, autocast_dtype(x), autocast_enabled(x)
            call = _Call(x, self.weight, self.bias, impl, dtype, autocast)
            sizes = (*x.shape[:-1], len(self.weight))
            return Logits.of(call, x, torch.empty(sizes, dtype=dtype, device="meta"))
        return super().forward(*given, **named)

    def _waits(self, x: Any) -> bool:
        """Whether a loss is likely to follow, and may be computed by the op."""
        if not (self.training and isinstance(x, Tensor) and x.dim() > 1 and self.fits(x)):
            return False
        given = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            requires_grad(given)
            and direct(given)
            and autocast_dtype(x) in DTYPES
            and (autocast_enabled(x) or x.dtype == self.weight.dtype)
            and x.stride(-1) == 1
            and not _distributed()  # whose wrappers hook what a model returns
            and (self._gptkernels.impl != "auto" or choose("auto", x) != "torch")
        )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; None where it is not the head of a model: a linear layer with as many
    outputs as an embedding of the model has rows, and more than inputs."""
    if original_class(module) is not nn.Linear:
        return None
    linear = cast("nn.Linear", module)
    if linear.out_features <= linear.in_features or not probe.is_vocabulary(linear.out_features):
        return None
    return Head, {"transposed": False}
