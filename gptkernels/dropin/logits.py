"""A language model's head, whose logits wait: a loss that is computed of them needs none in memory.

In training, the swapped head returns `Logits`, a tensor that knows hidden states and weight.
F.cross_entropy of it is `gptkernels.linear_cross_entropy`, in whatever model or training loop that
is called; so is that of some of the rows, and of them in another shape or in float32, as
transformers' models and nanoGPT's form make them. For anything else the logits are computed, then
and there, and all goes on as without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gptkernels.core.autocast import autocast_dtype, autocast_enabled
from gptkernels.core.autograd import requires_grad
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


class _Head(NamedTuple):
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    impl: str
    dtype: torch.dtype  # what it computes in
    autocast: bool


class Logits(Tensor):
    """The logits (..., V) of hidden states (..., C), in `dtype`, that nobody has looked at."""

    _hidden: Tensor
    _head: _Head
    _versions: tuple[int, ...]
    _found: Tensor | None

    @staticmethod
    def of(hidden: Tensor, head: _Head, dtype: torch.dtype, versions: tuple[int, ...]) -> Any:
        """`versions`: of the tensors when the head was called."""
        self: Any = Tensor._make_wrapper_subclass(
            Logits,
            (*hidden.shape[:-1], head.weight.shape[0]),
            dtype=dtype,
            device=hidden.device,
            requires_grad=True,
        )
        self._hidden, self._head, self._versions, self._found = hidden, head, versions, None
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
        if func is F.cross_entropy and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"), *args)
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
        """Below autograd it is too late for gradients. Only a call from C++ comes here."""
        raise NotImplementedError(
            f"{func} got the logits of a head that gptkernels.accelerate swapped before they were "
            "computed; call gptkernels.accelerate(model, losses=False)"
        )

    def _unseen(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The result where it needs no logits in memory; else None."""
        if self._found is not None:
            return None
        if func is F.cross_entropy:
            return self._loss(*args, **kwargs)
        if func is Tensor.float or (func is Tensor.to and args == (torch.float32,) and not kwargs):
            return Logits.of(self._hidden, self._head, torch.float32, self._versions)
        if func in _SHAPES or (func is Tensor.__getitem__ and _cuts(args[0])):
            return self._cut(func, args, kwargs)
        return None

    def _cut(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Other shapes, and some of the rows, each with all of its logits."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, (*_, width) = self.shape, self._hidden.shape
            empty = torch.empty(shape, device="meta", dtype=self.dtype)
            try:
                cut = func(empty, *args, **kwargs)
                if cut.dim() == 0 or cut.shape[-1] != shape[-1] or cut.dtype != self.dtype:
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
        return Logits.of(hidden, self._head, cut.dtype, (hidden._version, *self._versions[1:]))

    def _loss(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Any:
        """F.cross_entropy of the logits; None where the op has not all of it."""
        if not (
            weight is size_average is reduce is None
            and type(target) is Tensor
            and target.dtype == torch.int64
            and self._hidden.dim() == 2  # of more, dimension 1 has the classes
            and target.shape == self._hidden.shape[:1]
            and target.device == self._hidden.device
            and self._hidden.shape[0] > 0
        ):
            return None
        self._check_versions()
        head = self._head
        with _as_then(head, self._hidden):
            loss = linear_cross_entropy(
                self._hidden, head.weight, target, bias=head.bias, ignore_index=ignore_index,
                label_smoothing=label_smoothing, reduction=reduction, impl=head.impl,
            )  # fmt: skip
        with torch._C.DisableTorchFunctionSubclass():
            dtype = self.dtype
        autocast = torch.is_autocast_enabled(target.device.type)
        return loss if autocast else loss.to(dtype)

    def _logits(self) -> Tensor:
        """The logits themselves, with their graph."""
        if self._found is None:
            self._check_versions()
            head = self._head
            with torch.enable_grad(), _as_then(head, self._hidden):
                self._found = F.linear(self._hidden, head.weight, head.bias)
            with torch._C.DisableTorchFunctionSubclass():
                self._found = self._found.to(self.dtype)
        return self._found

    def _check_versions(self) -> None:
        if versions(self._hidden, self._head) != self._versions:
            raise RuntimeError(
                "the logits of this model's head are computed when they are needed, and the "
                "weights, or the hidden states, have changed since, by an optimizer's step say: "
                "look at them before, or call gptkernels.accelerate(model, losses=False)"
            )


def versions(hidden: Tensor, head: _Head) -> tuple[int, ...]:
    """How often the tensors were changed in place."""
    return tuple(t._version for t in (hidden, head.weight, head.bias) if t is not None)


def _as_then(head: _Head, hidden: Tensor) -> Any:
    """A context with autocast as it was when the head was called."""
    return torch.autocast(hidden.device.type, head.dtype, enabled=head.autocast)


def _seen(value: Any) -> Any:
    return value._logits() if isinstance(value, Logits) else value


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
            x, bias = given[0], self.bias
            autocast = autocast_enabled(x)
            head = _Head(self.weight, bias, self._gptkernels.impl, autocast_dtype(x), autocast)
            return Logits.of(x, head, head.dtype, versions(x, head))
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
            and not _distributed()  # whose wrappers look for gradients where Logits have none
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
