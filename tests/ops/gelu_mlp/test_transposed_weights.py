"""Weights that lie transposed, as Conv1D's: no pass of "torch" and "cpu" copies one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from harness import BF16, FP32
from op_inputs import gelu_mlp_inputs as inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptkernels import gelu_mlp
from gptkernels.core.choice import unavailable
from gptkernels.ops.gelu_mlp import op

WIDTH, INNER = 40, 56


class _Allocations(TorchDispatchMode):
    """Keeps every tensor of a weight's size that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.kept += [x for x in found if isinstance(x, Tensor) and x.numel() == WIDTH * INNER]
        return result


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 50])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_no_weight_is_copied(
    impl: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unavailable(impl, "cpu", dtype):
        pytest.skip("the CPU kernels are not built")
    passes = importlib.import_module(f"gptkernels.ops.gelu_mlp.{impl}")
    tensors = {name: x.detach() for name, x in inputs(rows, WIDTH, INNER, dtype=dtype).items()}
    for name in ("w1", "w2"):
        tensors[name] = tensors[name].t().contiguous().t()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    seen: dict[str, set[int]] = {}

    def looked_at(name: str) -> Any:
        def run(*given: Any) -> Any:
            *arguments, named = given
            assert named == impl
            with _Allocations() as made:
                result = getattr(passes, name)(*arguments)
            seen[name] = {x.untyped_storage().data_ptr() for x in made.kept}
            seen[name] |= {
                x.data_ptr()
                for x in arguments
                if isinstance(x, Tensor) and x.shape[:1] != (rows,) and x.dim() == 2
            }
            return result

        return run

    for name in ("gelu_mlp_fwd", "gelu_mlp_bwd"):
        monkeypatch.setattr(op, name, looked_at(name))
    gelu_mlp(**leaves, impl=impl).sum().backward()
    weights = {leaves["w1"].data_ptr(), leaves["w2"].data_ptr()}
    gradients = {leaves["w1"].grad.data_ptr(), leaves["w2"].grad.data_ptr()}
    assert seen["gelu_mlp_fwd"] == weights
    assert seen["gelu_mlp_bwd"] == weights | gradients
