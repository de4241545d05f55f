"""A call goes past PyTorch's dispatcher only where nothing watches it: each watcher is tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, each
from right import Calls
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import layer_norm
from gptkernels.core.direct import direct
from gptkernels.ops.layer_norm import torch as implementation

X = torch.ones(3)


class OfAnotherClass(Tensor):
    """Any subclass could handle calls itself."""


def test_plain_arguments_are_called_directly() -> None:
    parameter = torch.nn.Parameter(X)
    assert direct((X, parameter, None, True, 1, 0.5, "cpu", [True], torch.float32, X.device))


@pytest.mark.parametrize("argument", [X.as_subclass(OfAnotherClass), torch.SymInt, object()])
def test_another_class_is_not(argument: Any) -> None:
    assert not direct((X, argument))


@pytest.mark.parametrize(
    "argument",
    [
        torch._neg_view(X),
        torch._efficientzerotensor(3),
        torch.ones(3, dtype=torch.cfloat).conj().imag,
    ],
    ids=["negative", "zeros", "conjugate"],
)
def test_values_that_memory_does_not_hold_are_not(argument: Tensor) -> None:
    assert not direct((argument,))
    found = layer_norm(torch.zeros(3), torch.ones(3), residual=argument, prenorm=True)
    assert torch.equal(found[1], argument.clone())


@pytest.mark.parametrize(
    "watcher",
    [TorchDispatchMode, TorchFunctionMode, FakeTensorMode, torch.profiler.profile],
    ids=lambda watcher: watcher.__name__,
)
def test_under_a_mode_or_a_profiler_it_is_not(watcher: Any) -> None:
    with watcher():
        assert not direct((X,))
    assert direct((X,))


@each
@pytest.mark.parametrize("gradients", [False, True], ids=["without", "with"])
def test_a_mode_sees_each_pass_that_it_is_on_for(impl: str, gradients: bool) -> None:
    """Also where it is on for the backward pass alone: forward went past the dispatcher."""
    ops = torch.ops.gptkernels
    x = torch.randn(2, 8, device=DEVICE, requires_grad=gradients)
    weight = torch.ones(8, device=DEVICE)
    with Calls(ops.layer_norm_fwd.default) as calls:
        layer_norm(x, weight, impl=impl)
    assert len(calls) == 1
    if gradients:
        y = layer_norm(x, weight, impl=impl)
        with Calls(ops.layer_norm_bwd.default) as calls:
            y.backward(torch.ones_like(y))
        assert len(calls) == 1


def test_in_a_level_of_forward_mode_it_is_not() -> None:
    with forward_ad.dual_level():
        assert not direct((X,))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_under_a_transform_it_is_not(transform: Any) -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(direct((X,)))
        return x.sum()

    transform(function)(X)
    assert seen == [False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_while_tracing_or_compiling_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(direct((X,)))
        return x + 1

    torch.jit.trace(function, X, check_trace=False)
    assert seen == [False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not direct((X,))


def test_tensors_on_meta_get_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "layer_norm_fwd", None)
    x = torch.empty(2**40, 8, device="meta")
    assert layer_norm(x, x[0], impl="torch").shape == x.shape
