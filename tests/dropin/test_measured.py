"""What tables say decides in accelerated models too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gptkernels
from gptkernels.core import plans
from gptkernels.core.tuned import PYTORCH, Entry, Table
from gptkernels.dropin import swap
from gptkernels.ops.gelu_mlp import cpu as mlp_kernels
from gptkernels.ops.layer_norm import cpu as norm_kernels

Ran = list[str]


@pytest.fixture(autouse=True)
def _own_tables() -> Iterator[None]:
    plans.use("cpu", None)
    yield
    plans.use("cpu", None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Which CPU kernels are called."""
    seen: Ran = []
    for module, name in (
        (norm_kernels, "layer_norm_fwd"),
        (norm_kernels, "without_statistics"),
        (mlp_kernels, "gelu_mlp_fwd"),
    ):
        function = getattr(module, name)

        def spy(*given: Any, name: str = name, kept: Any = function) -> Any:
            seen.append(name)
            return kept(*given)

        monkeypatch.setattr(module, name, spy)
    return seen


def norm() -> tuple[nn.Module, torch.Tensor]:
    """Of few rows in fp32, which the rule leaves to PyTorch."""
    model = nn.Sequential(nn.LayerNorm(16))
    gptkernels.accelerate(model)
    return model, torch.randn(5, 16)


def mlp() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    gptkernels.accelerate(model)
    return model, torch.randn(40, 16)


def install(way: str, model: nn.Module, x: torch.Tensor) -> None:
    """From now on this way wins in the classes of what the model calls."""
    with plans.recording() as calls:
        model(x)
    assert calls
    plans.use("cpu", Table(Entry(call.key, ((1.0, way),)) for call in calls))


@pytest.mark.parametrize("make", [norm, mlp])
@pytest.mark.parametrize("static", ["cpu", "torch"])
def test_a_table_decides(make: Any, static: str, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rule, or the static choice as on a GPU, leaves the call to PyTorch."""
    monkeypatch.setattr(swap, "choose", lambda *_: static)
    model, x = make()
    gptkernels.restore(model)
    wanted = model(x)
    gptkernels.accelerate(model)
    for way in ("cpu", PYTORCH):
        install(way, model, x)
        ran.clear()
        assert torch.allclose(model(x), wanted, atol=1e-5)
        assert bool(ran) == (way == "cpu")


@pytest.mark.parametrize("make", [norm, mlp])
def test_where_nothing_was_measured_the_rule_decides(make: Any, ran: Ran) -> None:
    """Beside a table of other classes."""
    model, x = make()
    model(x)
    without = list(ran)
    other = nn.Sequential(nn.LayerNorm(24))
    gptkernels.accelerate(other)
    install("cpu", other, torch.randn(5, 24))
    ran.clear()
    model(x)
    assert ran == without


def test_a_call_that_does_not_fit_is_refused() -> None:
    """With a table as without one: half of a model may still be elsewhere."""
    model, x = norm()
    install("cpu", model, x)
    model.to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match="device"):
            model(x)
