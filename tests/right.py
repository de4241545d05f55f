"""How results are held to the truth by the rule of parity, and to the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from harness import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels.core import philox
from gptkernels.truth import baseline, parity, reference

# How an op computes, which the truth does not depend on.
HOW = frozenset({"impl", "recompute", "deterministic", "num_splits", "build"})
OUTPUTS = {"layer_norm": ("y", "s"), "gelu_mlp": ("y",)}


def assert_right(
    op: Callable[..., Any],
    tensors: dict[str, Any],
    seed: int = 0,
    *,
    name: str | None = None,
    gradients: bool = True,
    **options: Any,
) -> None:
    """`op(**tensors, **options)` against the truth and the yardstick called `name`, by default as
    the op is: outputs, which are poisoned before, and gradients. Dropout drops the same in all."""
    name = name or op.__name__
    formula: dict[str, Any] = {k: v for k, v in options.items() if k not in HOW}
    if options.get("dropout_p"):
        torch.manual_seed(seed)
        formula["rng"] = philox.draw(torch.device(DEVICE))
    parity.assert_parity(
        seeded(functools.partial(op, **options), seed),
        functools.partial(getattr(baseline, name), **formula),
        functools.partial(getattr(reference, name), **formula),
        tensors,
        gradients=gradients,
        seed=seed,
        names=OUTPUTS.get(name, ("out", "lse")),
    )


def seeded(call: Callable[..., Any], seed: int = 11) -> Callable[..., Any]:
    """The same call, which draws the same random numbers each time."""

    def function(*arguments: Any, **named: Any) -> Any:
        torch.manual_seed(seed)
        return call(*arguments, **named)

    return function


def run(
    call: Callable[..., Any],
    tensors: dict[str, Any],
    cotangents: Sequence[Tensor] | None = None,
    wanted: Iterable[str] | None = None,
) -> list[Tensor]:
    """Outputs, then the gradients of the wanted inputs, of all by default.

    Without cotangents each output's is 1 more than the output, where that is finite.
    """
    chosen = [k for k, v in tensors.items() if v is not None and (wanted is None or k in wanted)]
    leaves = {
        k: v if v is None else v.detach().requires_grad_(k in chosen) for k, v in tensors.items()
    }
    outputs = call(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if cotangents is None:
        cotangents = [1 + out.detach().nan_to_num(posinf=0.0, neginf=0.0) for out in outputs]
    found = torch.autograd.grad(outputs, [leaves[k] for k in chosen], cotangents)
    return [*(out.detach() for out in outputs), *found]


class Calls(TorchDispatchMode):
    """The arguments of each call of one registered op while this is entered."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.seen = op, []

    def __enter__(self) -> Any:
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Bit for bit."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"tensor {number}"


def assert_gradients_alone(
    call: Callable[..., Any], tensors: dict[str, Any], *more: Sequence[str]
) -> None:
    """Each gradient, and each of these sets, is the same if no other is asked for."""
    everything = run(call, tensors)
    outputs = everything[: len(everything) - len(tensors)]
    all_gradients = dict(zip(tensors, everything[len(outputs) :], strict=True))
    for wanted in (*([name] for name in tensors), *more):
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in tensors.items()}
        returned = call(**leaves)
        returned = list(returned) if isinstance(returned, tuple) else [returned]
        torch.autograd.backward(returned, [1 + out.nan_to_num(neginf=0.0) for out in outputs])
        assert [k for k, leaf in leaves.items() if leaf.grad is not None] == list(wanted)
        for k in wanted:
            assert torch.equal(leaves[k].grad, all_gradients[k]), k
