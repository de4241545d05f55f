"""The parity rule: it decides whether a result is correct. Tests, `gptkernels verify`, the demo and
the benchmarks all use it.

The truth is the formula of `gptkernels.truth.reference`, computed in fp64 on the same inputs. The
yardstick is eager PyTorch in the result's dtype (`gptkernels.truth.baseline`), with sums in fp32
(`gptkernels.truth.yardstick`). A result passes when

    max|result - truth| <= k * max|baseline - truth| + 2 * eps * max|truth|
    k = 2 forward, 3 gradients

where eps is that of the result's dtype. So a result may have a small multiple of PyTorch's own
rounding error. No hand-picked tolerances. A result must have infinities exactly where the truth has
them, and NaN exactly where the truth has NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gptkernels.truth.yardstick import FullSums

K_FORWARD, K_GRADIENT = 2.0, 3.0

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Measurement:
    """The error of one tensor: of an output ("forward") or of an input's gradient ("gradient")."""

    name: str
    direction: str
    error: float  # max|result - truth|; inf if NaN or an infinity is missing or in a wrong place
    baseline_error: float  # max|baseline - truth|
    limit: float  # the largest error that passes
    passed: bool

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict} {self.direction} {self.name}: error {self.error:.3e}, "
            f"limit {self.limit:.3e}, PyTorch's error {self.baseline_error:.3e}"
        )


def compare(
    result: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    k: float,
    name: str = "y",
    direction: str = "forward",
) -> Measurement:
    """Applies the rule to one result. The three tensors have one shape; truth is fp64. Raises
    ValueError for a result of another shape."""
    if result.shape != truth.shape:
        raise ValueError(
            f"{name}: the result has shape {tuple(result.shape)}, the truth {tuple(truth.shape)}"
        )
    error, baseline_error = _max_error(result, truth), _max_error(baseline, truth)
    finite = truth[torch.isfinite(truth)].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    limit = k * baseline_error + 2 * torch.finfo(result.dtype).eps * largest
    # A baseline that loses infinities or NaN has an infinite error. Its limit would pass anything,
    # so it passes nothing.
    return Measurement(name, direction, error, baseline_error, limit, error <= limit < float("inf"))


def measure(
    candidate: Op,
    baseline: Op,
    truth: Op,
    inputs: Mapping[str, Any],
    *,
    gradients: bool = True,
    k_forward: float = K_FORWARD,
    k_gradient: float = K_GRADIENT,
    seed: int = 0,
    names: Sequence[str] = (),
) -> list[Measurement]:
    """Compares the outputs of `candidate(**inputs)`, and the gradients of every floating input,
    with the truth.

    The candidate runs under `poisoned_outputs`. `truth` gets the floating inputs in fp64, a
    conversion that is exact. The cotangents (gradients of the outputs) are random: they are drawn
    once, in each output's dtype, from the seed after `seed`, since `seed` may have given the
    inputs. `names` names the outputs, in order. Raises whatever the callables raise.
    """
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)
    with poisoned_outputs():  # this poisons what the backward pass allocates as well
        results = run(candidate, inputs, gradients, generator, None)
    cotangents = results.cotangents
    with FullSums():
        baselines = run(baseline, inputs, gradients, generator, cotangents)
    truths = run(truth, {k: upcast(v) for k, v in inputs.items()}, gradients, generator, cotangents)
    measurements = []
    for i, (r, b, t) in enumerate(
        zip(results.outputs, baselines.outputs, truths.outputs, strict=True)
    ):
        name = names[i] if i < len(names) else f"output {i}"
        measurements.append(compare(r, b, t, k=k_forward, name=name, direction="forward"))
    for name, r in results.gradients.items():
        b, t = baselines.gradients[name], truths.gradients[name]
        measurements.append(compare(r, b, t, k=k_gradient, name=f"d{name}", direction="gradient"))
    return measurements


def assert_parity(
    candidate: Op, baseline: Op, truth: Op, inputs: Mapping[str, Any], **options: Any
) -> None:
    """Calls `measure`, and raises AssertionError with a list of all tensors that fail the rule."""
    measurements = measure(candidate, baseline, truth, inputs, **options)
    failures = [str(m) for m in measurements if not m.passed]
    if failures:
        raise AssertionError("\n".join(failures))


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fills the memory that launchers allocate with NaN (integers: with the largest value, bools:
    with True), so that elements that no kernel writes are noticed."""
    with (
        mock.patch.object(torch, "empty", _poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoning(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", _poisoning(Tensor.new_empty)),
    ):
        yield


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).max)

    return poisoned


@dataclass(frozen=True)
class Results:
    """What a callable returned, and the gradients of its floating inputs by their names."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    cotangents: list[Tensor]


def run(
    op: Op,
    inputs: Mapping[str, Any],
    gradients: bool,
    generator: torch.Generator,
    cotangents: list[Tensor] | None,
) -> Results:
    """Outputs and gradients of `op(**inputs)`; cotangents are drawn in each output's dtype unless
    they are given."""
    leaves = {k: _leaf(v) if gradients else v for k, v in inputs.items()}
    returned = op(**leaves)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    if cotangents is None:
        cotangents = [
            torch.randn(o.shape, generator=generator).to(device=o.device, dtype=o.dtype)
            for o in outputs
        ]
    if not gradients:
        return Results(outputs, {}, cotangents)
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    pairs = [
        (o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad
    ]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wanted.values()),
        [c for _, c in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return Results([o.detach() for o in outputs], dict(zip(wanted, found, strict=True)), cotangents)


def _leaf(value: Any) -> Any:
    """Returns a floating tensor as a fresh leaf of autograd, with the same strides: kernels must
    see the caller's layout. Returns other values as they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def upcast(value: Any) -> Any:
    """A floating tensor in fp64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _max_error(result: Tensor, truth: Tensor) -> float:
    result = result.double()
    finite = torch.isfinite(truth)
    if not torch.allclose(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    error = (result[finite] - truth[finite]).abs()
    if error.numel() == 0:
        return 0.0
    return float("inf") if error.isnan().any() else error.max().item()
