"""Whether an op that reads a module's parameters gives what calling the module would give.

A fused op stands for several modules. It may do so only where each of them computes what its class
says. It would bypass an adapter (LoRA), a parametrization, a quantised twin or a hook, and results
or gradients would be wrong. There the layers call the modules, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_Kind = TypeVar("_Kind", bound=nn.Module)

# What the forward of each class was before anybody patched it.
_FORWARD: dict[type, Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, nn.GELU, nn.Dropout, nn.LayerNorm)
}


def remember(kind: type[_Kind]) -> type[_Kind]:
    """Decorates a class that the functions below are asked about."""
    _FORWARD.setdefault(kind, kind.forward)
    return kind


def is_plain(module: Any, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether `not_plain` finds nothing."""
    return not_plain(module, kind) is None


def not_plain(module: Any, kind: type[nn.Module]) -> str | None:
    """Returns why `module` may compute something else than `kind` on its parameters; None where it
    computes just that.

    It must be exactly of this class (a parametrization makes a subclass), or be what
    `gptkernels.accelerate` made of it, with the class's own forward, without hooks, its own or
    global ones, and with plain tensors as parameters.
    """
    if original_class(module) is not kind:
        return f"is a {class_name(module)}, not a plain {kind.__name__}"
    if "forward" in module.__dict__ or kind.forward is not _FORWARD.get(kind, kind.forward):
        return "has another forward"
    if (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()
    ):
        return "has hooks"
    for parameter in module._parameters.values():
        if type(parameter) is not nn.Parameter and is_traceable_wrapper_subclass(parameter):
            return f"has a {type(parameter).__name__} as a parameter"
    return None


def not_plain_in(parent: nn.Module, kind: type[nn.Module], *names: str) -> str | None:
    """Returns what `not_plain` finds in the first of these children that is not plain."""
    for name in names:
        reason = not_plain(getattr(parent, name), kind)
        if reason is not None:
            return f"{name} {reason}"
    return None


def original_class(module: Any) -> type[Any]:
    """The class of `module`; that before `gptkernels.accelerate` where that swapped it."""
    kind: type[Any] = type(module)
    return kind.__dict__["_gptkernels"].original if "_gptkernels" in kind.__dict__ else kind


def class_name(module: Any) -> str:
    """The full name of a module's class. Some adapters are called Linear too."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
