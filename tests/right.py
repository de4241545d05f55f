"""Compares results with the truth, by the parity rule, and with other results bit for bit."""

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

# Options that change how an op computes, but not the truth.
HOW = frozenset({"impl", "recompute", "deterministic", "num_splits", "build"})
OUTPUTS = {
    "layer_norm": ("y", "s"),
    "gelu_mlp": ("y",),
    "linear_cross_entropy": ("losses",),
}


def assert_right(
    op: Callable[..., Any],
    tensors: dict[str, Any],
    seed: int = 0,
    *,
    name: str | None = None,
    gradients: bool = True,
    **options: Any,
) -> None:
    """Asserts that the outputs and gradients of `op(**tensors, **options)` pass the parity rule.

    The truth and the yardstick are the functions called `name`, by default the op's name. Outputs
    are poisoned before the op runs. All three drop the same elements.
    """
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
    """Returns a function that does the same call, with the same random numbers each time."""

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
    """Returns the outputs, then the gradients of the wanted inputs, by default of all inputs.

    The default cotangent of an output is the output + 1, with 1 in place of infinities and NaN.
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
    """A context whose value is a list: the arguments of each call of one registered op inside the
    context."""

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
    """Asserts that the tensors are equal bit for bit."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"tensor {number}"


def assert_gradients_alone(
    call: Callable[..., Any], tensors: dict[str, Any], *more: Sequence[str]
) -> None:
    """Asserts that each gradient, and each of these sets of gradients, has the same bits if no
    other gradient is asked for."""
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


def check_op(op: Any, arguments: Sequence[Any]) -> None:
    """Runs PyTorch's checks of a registered op on a call of it, whose last argument is `impl`. The
    slow one compiles the call, and knows nothing of the implementation, so one gets it."""
    fast = ("test_schema", "test_faketensor", "test_autograd_registration")
    checks = (*fast, "test_aot_dispatch_dynamic") if arguments[-1] == "torch" else fast
    torch.library.opcheck(op, tuple(arguments), test_utils=checks)
