"""The MLP of a transformer: a linear layer, GELU and another linear layer, in a module that has
nothing else but, perhaps, a dropout behind them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.dropin import measured
from gptkernels.dropin.linear import is_transposed, loses, weight
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Match, OneInput
from gptkernels.nn.plain import class_name, not_plain, original_class, remember
from gptkernels.ops.gelu_mlp.op import gelu_mlp

_Linear = tuple[
    tuple[str, bool], ...
]  # names of the linear layers, and whether they lie transposed


class MLP(OneInput):
    """second(gelu(first(x))) as one op, and the module's dropout behind it. Where a child was
    hooked or replaced since, the module's own forward runs."""

    what = "linear, GELU, linear as one op"

    def fuses(self, x: Any) -> bool:
        """Where a table could say something, `fused` asks it."""
        if self._gptkernels.impl == "auto" and type(x) is Tensor and measured.asked(x):
            return self.fits(x)
        return super().fuses(x)

    def fused(self, x: Tensor) -> Tensor | None:
        """x (..., C) -> (..., C)."""
        swap, children = self._gptkernels, self._modules
        if tuple(children) != swap.names:  # an nn.Sequential that was cut or has more
            return None
        if any(not_plain(children[name], kind) for name, kind in swap.stands_for):
            return None
        (first, across), (second, back) = swap.linear
        given: Any = (
            x if x.stride(-1) == 1 else x.contiguous(),
            weight(children[first], across), children[first].bias,  # type: ignore[union-attr]
            weight(children[second], back), children[second].bias,  # type: ignore[union-attr]
        )  # fmt: skip
        if swap.impl == "auto":
            runs = measured.gelu_mlp(*given, swap.approximate)  # type: ignore[call-arg]
            if runs is False or (runs is None and (loses(x, across) or not super().fuses(x))):
                return None
        y = gelu_mlp(*given, approximate=swap.approximate, impl=swap.impl)
        return y if swap.dropout is None else self.get_submodule(swap.dropout)(y)


def approximate_of(activation: Any) -> str | None:
    """ "tanh" or "none", which GELU of PyTorch an activation is; None where it is another one."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if not_plain(activation, nn.GELU) is None else None


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no MLP."""
    children = dict(module.named_children())
    if isinstance(module, nn.ModuleDict | nn.ModuleList):  # nobody calls it
        return None
    if module._parameters or module._buffers or not 2 <= len(children) <= 4:
        return None
    lying = ((name, is_transposed(child)) for name, child in children.items())
    linear = tuple((name, across) for name, across in lying if across is not None)
    if len(linear) != 2:
        return _wrapped(children)
    first, second = (weight(children[name], across) for name, across in linear)
    if first.dim() != 2 or first.shape != second.t().shape:
        return None
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    if len(dropouts) > 1:
        return "it has a dropout between its linear layers"
    inside = []
    for name, child in children.items():
        if name not in dropouts:
            kind = remember(original_class(child))
            inside.append((name, kind))
            reason = not_plain(child, kind)
            if reason is not None:
                return f"{name} {reason}"
    facts: dict[str, Any] = {"linear": linear, "dropout": dropouts[0] if dropouts else None}
    C = first.shape[1]
    for approximate in ("tanh", "none"):
        shape = (2, 5 if C != 5 else 7, C)
        if probe.agrees(module, _formula, shape, approximate=approximate, **facts):
            facts["names"] = tuple(children)
            return MLP, {**facts, "approximate": approximate, "stands_for": tuple(inside)}
    return "its forward is not linear, GELU, linear and a dropout"


def _wrapped(children: dict[str, nn.Module]) -> str | None:
    """Of a module with a GELU, which child is in the place of a linear layer."""
    if not any(_is_gelu(child) for child in children.values()):
        return None
    for name, child in children.items():
        if is_transposed(child) is None and not _is_gelu(child) and type(child) is not nn.Dropout:
            return f"{name} is a {class_name(child)}"
    return None


def _is_gelu(module: nn.Module) -> bool:
    return "gelu" in type(module).__name__.lower()


def _formula(
    module: Any, x: Tensor, linear: _Linear, dropout: str | None, approximate: str
) -> Tensor:
    (first, across), (second, back) = linear
    first, second = module.get_submodule(first), module.get_submodule(second)
    h = F.linear(x, weight(first, across), first.bias)
    y = F.linear(F.gelu(h, approximate=approximate), weight(second, back), second.bias)
    return y if dropout is None else module.get_submodule(dropout)(y)
