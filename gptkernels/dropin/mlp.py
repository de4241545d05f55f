"""The MLP of a transformer: a linear layer, GELU and another linear layer, in a module that has
nothing else but, perhaps, a dropout behind them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gptkernels.dropin.linear import loses, transposed, weight_of
from gptkernels.dropin.probe import agrees
from gptkernels.dropin.swap import Fused, Match
from gptkernels.nn.plain import class_name, not_plain, original_class, remember
from gptkernels.ops.gelu_mlp.op import gelu_mlp


class MLP(Fused):
    """second(gelu(first(x))) as one op, and the module's dropout behind it. Where a child was
    hooked or replaced since, the module's own forward runs."""

    what = "linear, GELU, linear as one op"
    linear: tuple[str, str]  # the names of the linear layers
    parts_of_op: tuple[tuple[str, type[nn.Module]], ...]  # the children that the op stands for
    dropout_name: str | None
    approximate: str
    transposed: bool  # the first weight is (in, out)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        children: dict[str, Any] = self._modules
        if (
            not self.fuses(x)
            or (self.impl == "auto" and loses(x, self.transposed))
            or any(not_plain(children[n], kind) for n, kind in self.parts_of_op)
        ):
            return super().forward(x)
        first, second = (children[name] for name in self.linear)
        y = gelu_mlp(
            x, weight_of(first), first.bias, weight_of(second), second.bias,
            approximate=self.approximate, impl=self.impl,
        )  # fmt: skip
        return y if self.dropout_name is None else children[self.dropout_name](y)


def approximate_of(activation: Any) -> str | None:
    """ "tanh" or "none", which GELU of PyTorch an activation is; None where it is another one."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if not_plain(activation, nn.GELU) is None else None


def match(module: nn.Module) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no MLP."""
    children = dict(module.named_children())
    linear = tuple(name for name, child in children.items() if transposed(child) is not None)
    if isinstance(module, nn.ModuleDict | nn.ModuleList):  # nobody calls it
        return None
    if module._parameters or module._buffers or not 2 <= len(children) <= 4:
        return None
    if len(linear) != 2:
        return _wrapped(children)
    first, second = (weight_of(children[name]) for name in linear)
    if first.dim() != 2 or first.shape != second.t().shape:
        return None
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    if len(dropouts) > 1:
        return "it has a dropout between its linear layers"
    inside = []
    for name, child in children.items():
        if name not in dropouts:
            kind = original_class(child)
            remember(kind)
            inside.append((name, kind))
            reason = not_plain(child, kind)
            if reason is not None:
                return f"{name} {reason}"
    across = {"transposed": transposed(children[linear[0]])}
    facts = {"linear": linear, "dropout_name": dropouts[0] if dropouts else None}
    for approximate in ("tanh", "none"):
        if agrees(module, _formula, (3, first.shape[1]), approximate=approximate, **facts):
            return MLP, {
                **facts,
                **across,
                "approximate": approximate,
                "parts_of_op": tuple(inside),
            }
    return "its forward is not linear, GELU, linear and a dropout"


def _wrapped(children: dict[str, nn.Module]) -> str | None:
    """Of a module with a GELU, which child is in the place of a linear layer."""
    if not any(_is_gelu(child) for child in children.values()):
        return None
    for name, child in children.items():
        if transposed(child) is None and not _is_gelu(child) and type(child) is not nn.Dropout:
            return f"{name} is a {class_name(child)}"
    return None


def _is_gelu(module: nn.Module) -> bool:
    return "gelu" in type(module).__name__.lower()


def _formula(
    module: Any, x: Tensor, linear: tuple[str, str], dropout_name: str | None, approximate: str
) -> Tensor:
    first, second = (module.get_submodule(name) for name in linear)
    h = F.linear(x, weight_of(first), first.bias)
    y = F.linear(F.gelu(h, approximate=approximate), weight_of(second), second.bias)
    return y if dropout_name is None else module.get_submodule(dropout_name)(y)
