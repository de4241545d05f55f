"""What gelu_mlp keeps for the backward pass, and what must not change a bit of its results."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import (
    DEVICE,
    FP16,
    FP32,
    by_dtype,
    each,
    emulated,
    needs_cuda,
    runnable,
)
from op_inputs import gelu_mlp_inputs as inputs
from right import Calls, assert_gradients_alone, assert_same, run
from torch import Tensor

from gptkernels import gelu_mlp
from gptkernels.core import cuda_products as products
from gptkernels.ops.gelu_mlp import cuda as cuda_kernels


class TestMemory:
    @each
    @pytest.mark.parametrize(
        ("recompute", "saved"),
        [(False, ["(6, 10)", "(20, 10)", "(20,)", "(10, 20)", "(6, 20)"]),
         (True, ["(6, 10)", "(20, 10)", "(20,)", "(10, 20)"])],
    )  # fmt: skip
    def test_what_is_kept(self, impl: str, recompute: bool, saved: list[str]) -> None:
        """It keeps x, the weights, b1 and the pre-activation; with recompute not the latter."""
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        leaves = {k: v.requires_grad_() for k, v in inputs(2, 3, 10, 20).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gelu_mlp(**leaves, impl=impl, recompute=recompute)
        assert [str(tuple(tensor.shape)) for tensor in kept] == saved
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        fresh = [t for t in kept if t.untyped_storage().data_ptr() not in own]
        assert len(fresh) == (0 if recompute else 1)

    @each
    def test_inference_keeps_no_pre_activation(self, impl: str) -> None:
        leaves = {k: v.requires_grad_() for k, v in inputs(6, 10, 20).items()}
        with Calls(torch.ops.gptkernels.gelu_mlp_fwd.default) as calls:
            with torch.no_grad():
                gelu_mlp(**leaves, impl=impl)
            gelu_mlp(**leaves, impl=impl)
        keep_h = 6
        assert [arguments[keep_h] for arguments in calls] == [False, True]

    @runnable
    def test_recomputation_changes_no_bit(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(70, 33, 130, dtype=dtype)
        kept, rebuilt = (
            run(functools.partial(gelu_mlp, impl=impl, recompute=recompute), tensors)
            for recompute in (False, True)
        )
        assert_same(kept, rebuilt)

    @pytest.mark.parametrize("dtype", [FP32, FP16])
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    def test_activation_is_rebuilt_bit_for_bit(self, dtype: torch.dtype, approximate: str) -> None:
        kernels = pytest.importorskip("gptkernels.ops.gelu_mlp.triton")
        x, w1, b1, w2, _ = inputs(70, 48, 130, dtype=dtype).values()
        h = torch.empty(70, 130, dtype=dtype, device=DEVICE)
        a = torch.empty_like(h)
        kernels.linear_gelu_fwd(x, w1, b1, h, a, approximate)
        _, rebuilt, _ = kernels.linear_gelu_bwd(x, w2, h, approximate, True, False)
        assert torch.equal(a, rebuilt)

    @needs_cuda
    @by_dtype
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    @pytest.mark.parametrize("inner", [130, 136])
    def test_activation_is_rebuilt_bit_for_bit_in_cuda(
        self, dtype: torch.dtype, approximate: str, inner: int
    ) -> None:
        x, w1, b1, w2, _ = inputs(70, 48, inner, dtype=dtype).values()
        h = torch.empty(70, inner, dtype=dtype, device=DEVICE)
        a = torch.empty_like(h)
        products.linear_fwd(x, w1, b1, out=h, activation=a, approximate=approximate)
        _, rebuilt, _ = cuda_kernels.linear_gelu_bwd(x, w2, h, approximate, True, False)
        assert torch.equal(a, rebuilt)

    @each
    @pytest.mark.parametrize("recompute", [False, True])
    def test_only_gradients_that_are_wanted(self, impl: str, recompute: bool) -> None:
        call = functools.partial(gelu_mlp, impl=impl, recompute=recompute)
        assert_gradients_alone(call, inputs(6, 10, 20), ["x", "b1"], ["w1", "w2"])


class TestIsolation:
    @runnable
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_a_bad_row_stays_alone(self, impl: str, dtype: torch.dtype, value: float) -> None:
        tensors = inputs(70, 33, 50, dtype=dtype)
        bad = tensors | {"x": tensors["x"].clone()}
        bad["x"][5, 7] = value
        call = functools.partial(gelu_mlp, impl=impl)
        clean, dirty = run(call, tensors), run(call, bad)
        others = torch.arange(70, device=DEVICE) != 5
        assert not torch.isfinite(dirty[0][5]).all()
        for a, b in zip(clean[:2], dirty[:2], strict=True):  # y and dx
            assert torch.equal(a[others], b[others])

    @runnable
    def test_a_bad_gradient_row_stays_alone(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(70, 33, 50, dtype=dtype)
        dy = torch.randn_like(tensors["x"])
        bad = dy.clone()
        bad[64] = float("nan")
        call = functools.partial(gelu_mlp, impl=impl)
        clean, dirty = run(call, tensors, [dy])[1], run(call, tensors, [bad])[1]
        others = torch.arange(70, device=DEVICE) != 64
        assert torch.isnan(dirty[64]).all()
        assert torch.equal(clean[others], dirty[others])

    @runnable
    def test_repeats_bit_for_bit(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(150, 33, 70, dtype=dtype)
        call = functools.partial(gelu_mlp, impl=impl)
        first = run(call, tensors)
        for _ in range(3):
            assert_same(run(call, tensors), first)

    @needs_cuda
    @emulated
    @by_dtype
    @pytest.mark.parametrize("schedule", ["reverse", "1", "2"])
    def test_order_of_cuda_threads_changes_no_bit(
        self, dtype: torch.dtype, schedule: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = inputs(150, 33, 70, dtype=dtype)
        call = functools.partial(gelu_mlp, impl="cuda")
        forward = run(call, tensors)
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        assert_same(run(call, tensors), forward)
