"""How a module's class is swapped, and swapped back.

The new class is a subclass of the module's own, with one method more: a forward (or another method)
that runs an op of this package where that gives the same result, and calls the original one where
it would not. The module itself stays as it was: its parameters, buffers, hooks and attributes are
not touched, and what the new class has to know (`impl`, names of children) is in one attribute of
the class, `_gptkernels`. The class has the name of the original, since programs look for names.
"""

from __future__ import annotations

import copyreg
import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gptkernels.core.checks import DTYPES
from gptkernels.core.choice import choose
from gptkernels.nn.plain import not_plain


class Fused(nn.Module):
    """Base of the kinds of swapped modules. A new class has the kind before the original, so that
    super() in a kind is the original.

    `_gptkernels` has the attributes impl, original (the module's class before) and forward (that
    of the original when it was swapped), and the facts that the kind's `match` found.
    """

    what: ClassVar[str]  # what the kind does, in a few words
    _gptkernels: ClassVar[Any]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Attributes of the original."""

    def fuses(self, x: Any) -> bool:
        """Whether the op is to run on x: always where an implementation was named, else where the
        package has one that was measured to be faster; and only if it `fits`."""
        return self.fits(x) and (self._gptkernels.impl != "auto" or choose("auto", x) != "torch")

    def fits(self, x: Any) -> bool:
        """Whether the op takes x, and nobody has patched the original class since."""
        swap = self._gptkernels
        return not (
            type(x) not in (Tensor, nn.Parameter)
            or x.dtype not in DTYPES
            or x.is_nested
            or torch._C._are_functorch_transforms_active()
            or swap.original.forward is not swap.forward
        )

    def extra_repr(self) -> str:
        """What repr shows."""
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}gptkernels impl={self._gptkernels.impl!r}"


class OneInput(Fused):
    """A kind whose forward takes one tensor. A call with anything else is the original's."""

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the original's."""
        if len(given) == 1 and not named and self.fuses(given[0]):
            y = self.fused(given[0])
            if y is not None:
                return y
        return super().forward(*given, **named)

    def fused(self, x: Tensor) -> Tensor | None:
        """The result by the op; None where the original has to compute it."""
        raise NotImplementedError


# What a file's `match` says of a module: the kind and the facts about it; why it is left alone; or
# None, where it is something else.
Match = tuple[type[Fused], dict[str, Any]] | str | None


class _Swapped(type):
    """The class of the new classes."""


def subclass(
    kind: type[Fused], original: type[nn.Module], impl: str, facts: tuple[tuple[str, Any], ...]
) -> type[nn.Module]:
    """The subclass of `original`, as it is now, that does what `kind` says."""
    key: Any = (kind, original, original.forward, impl, facts)
    made: type[nn.Module] = _subclass(*key)
    return made


@functools.cache
def _subclass(kind: Any, original: Any, forward: Any, impl: str, facts: Any) -> Any:
    swap = SimpleNamespace(impl=impl, original=original, forward=forward, **dict(facts))
    swap.parts = (kind, original, impl, facts)
    content = {
        "_gptkernels": swap,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return _Swapped(original.__name__, (kind, original), content)


def _reduce(made: Any) -> Any:
    """How pickle writes a new class: as the call that makes it."""
    if "_gptkernels" in made.__dict__:
        return subclass, made._gptkernels.parts
    return made.__qualname__  # somebody's subclass of one


copyreg.pickle(_Swapped, _reduce)


def is_swapped(module: nn.Module) -> bool:
    """Whether the class of `module` is one of the new ones."""
    return type(type(module)) is _Swapped and "_gptkernels" in type(module).__dict__


def is_wrapped(module: nn.Module) -> bool:
    """Whether the class of `module` is somebody's subclass of a new one, as FSDP makes them."""
    return type(type(module)) is _Swapped and "_gptkernels" not in type(module).__dict__


def dropout_p(child: nn.Module) -> float | None:
    """What an nn.Dropout drops now; None where it is something else, or hooked, and has to be
    called."""
    if not_plain(child, nn.Dropout) is not None:
        return None
    return cast("nn.Dropout", child).p if child.training else 0.0


def with_mask(impl: str, mask: Tensor | None) -> str:
    """The implementation of attention with this mask: the kernels for a GPU have none, and a model
    that gets one now and then should go on."""
    return "torch" if mask is not None and impl in ("triton", "cuda") else impl


def few(x: Tensor, most: int) -> bool:
    """Whether x (..., C) has at most so many rows. Under torch.compile always False: a question
    about sizes would be one that the graph asks."""
    return not torch.compiler.is_compiling() and x.numel() <= most * x.shape[-1]
