"""gelu_mlp against the truth, in every implementation that runs here. test_gelu_mlp_bits.py tests
what it keeps, and what must not change a bit of its results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    each,
    each_kernel,
    name_of,
    needs_cuda,
    runnable,
)
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import gelu_mlp_inputs as inputs
from right import assert_right, assert_same, check_op, run
from torch import Tensor

from gptkernels import gelu_mlp
from gptkernels.core import cuda_products as products
from gptkernels.core.choice import INTERPRETED
from gptkernels.truth import baseline, parity, reference

hold = functools.partial(assert_right, gelu_mlp)


class TestParity:
    @runnable
    @given(
        rows=st.integers(1, 150),
        width=st.integers(12, 80),
        inner=st.integers(12, 150),
        biases=st.booleans(),
        recompute=st.booleans(),
        approximate=st.sampled_from(["tanh", "none"]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size(
        self,
        impl: str,
        dtype: torch.dtype,
        rows: int,
        width: int,
        inner: int,
        biases: bool,
        recompute: bool,
        approximate: str,
        seed: int,
    ) -> None:
        tensors = inputs(rows, width, inner, dtype=dtype, biases=biases, seed=seed)
        hold(tensors, impl=impl, approximate=approximate, recompute=recompute, seed=seed)

    @runnable
    @pytest.mark.parametrize("sizes", [(2, 3, 64, 64), (65, 33, 129), (1, 128, 16), (0, 8, 16)])
    def test_edges_of_tiles(
        self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int
    ) -> None:
        hold(inputs(*sizes, dtype=dtype, seed=seed), impl=impl, seed=seed)

    @pytest.mark.parametrize("dtype", [FP16, FP32])
    @pytest.mark.parametrize("tile", [(128, 128, 64, 8, 4), (128, 128, 32, 8, 4)])
    def test_large_tiles(
        self,
        dtype: torch.dtype,
        tile: tuple[int, ...],
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The epilogue of large tiles runs in two halves. The tiles are set by hand, since shapes
        that choose them would be slow to interpret."""
        kernels = pytest.importorskip("gptkernels.ops.gelu_mlp.triton")
        monkeypatch.setattr(kernels, "_tile_for", lambda *_: kernels._Tile(*tile))
        hold(inputs(150, 70, 210, dtype=dtype, seed=seed), impl="triton", seed=seed)

    @needs_cuda
    @pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
    @pytest.mark.parametrize(
        "sizes",
        [
            (64, 64, 64),  # exactly one small tile
            (40, 328, 24),  # small tiles, more steps along k than stages
            (130, 328, 40),  # the same with two large tiles, one nearly empty
            (128, 40, 256),
            (136, 136, 264),  # large tiles, the last row, column and step incomplete
            (40, 329, 23),  # rows that allow no 16-byte access
            (130, 329, 39),
            (136, 137, 263),
        ],
        ids=str,
    )
    def test_tiles_of_cuda(self, dtype: torch.dtype, sizes: tuple[int, ...], seed: int) -> None:
        rows, width, inner = sizes
        hold(inputs(rows, width, inner, dtype=dtype, seed=seed), impl="cuda", seed=seed)

    @needs_cuda
    @pytest.mark.parametrize(("width", "inner"), [(8, 136), (9, 135)])
    def test_more_row_tiles_than_run_together_on_one_column_tile(
        self, width: int, inner: int, seed: int
    ) -> None:
        """The order of tiles is the same for all dtypes."""
        hold(inputs(1160, width, inner, dtype=BF16, seed=seed), impl="cuda", seed=seed)

    @needs_cuda
    @pytest.mark.parametrize(("rows", "dtype"), [(2048, FP16), (3125, BF16), (3125, FP32)])
    def test_many_rows_in_cuda(self, dtype: torch.dtype, rows: int, seed: int) -> None:
        """The weights' gradients sum over the rows in splits of k, the biases' in many partial
        sums."""
        a, b = (torch.empty(rows, cols, dtype=dtype, device=DEVICE) for cols in (12, 20))
        splits = products.product(products.PARTIALS, products.WEIGHT, a, b)
        assert splits == rows // 1024
        hold(inputs(rows, 12, 20, dtype=dtype, seed=seed), impl="cuda", seed=seed)

    @each_kernel
    @pytest.mark.parametrize("approximate", ["tanh", "none"])
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    def test_large_pre_activations(self, impl: str, approximate: str) -> None:
        """GELU and its derivative stay finite and accurate where powers or exponentials of h would
        overflow."""
        h = torch.tensor([0.0, -0.0, 1e-30, 3, -3, 6, -6, 20, -20, 1e4, -1e4, 1e13, -1e13, 3e38])
        identity = torch.eye(len(h), device=DEVICE)
        tensors = {"x": identity, "w1": torch.diag(h).to(DEVICE), "b1": None}
        tensors |= {"w2": identity, "b2": None}
        options = {"approximate": approximate}
        y, _, dw1, _ = run(functools.partial(gelu_mlp, **options, impl=impl), tensors, [identity])
        doubles = {k: v if v is None else v.double() for k, v in tensors.items()}
        truth = run(functools.partial(reference.gelu_mlp, **options), doubles, [identity.double()])
        for found, exact in ((y, truth[0]), (dw1, truth[2])):  # gelu(h) and gelu'(h)
            torch.testing.assert_close(
                found.diag().double(), exact.diag(), rtol=1e-6, atol=1e-6, check_dtype=False
            )

    @runnable
    @pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 5), (1, 7, 1)])
    def test_tiny_sizes(self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        """PyTorch's error on a handful of numbers is random, so the rule is applied to the largest
        of many draws."""
        limits: dict[str, list[parity.Measurement]] = {}
        for draw in range(10):
            for measurement in parity.measure(
                functools.partial(gelu_mlp, impl=impl),
                baseline.gelu_mlp,
                reference.gelu_mlp,
                inputs(*sizes, dtype=dtype, seed=draw),
                seed=draw,
            ):
                limits.setdefault(measurement.name, []).append(measurement)
        for drawn in limits.values():
            assert max(m.error for m in drawn) <= max(m.limit for m in drawn), drawn

    @each
    @pytest.mark.parametrize(
        "shape", [(8,), (3, 2, 8), (2, 1, 3, 2, 8), (0, 8), (2, 0, 3, 8)], ids=str
    )
    def test_any_rank(self, impl: str, shape: tuple[int, ...]) -> None:
        tensors, call = inputs(*shape, 12), functools.partial(gelu_mlp, impl=impl)
        found = run(call, tensors)
        assert found[0].shape == found[1].shape == shape
        wanted = run(call, tensors | dict(x=tensors["x"].reshape(-1, 8)))
        assert_same([x.view_as(y) for x, y in zip(found, wanted, strict=True)], wanted)


class TestStrides:
    @runnable
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("offset", [8, 5])
    def test_rows_apart(self, impl: str, dtype: torch.dtype, offset: int, recompute: bool) -> None:
        """Gaps between rows do not change a bit, unless rows no longer start at multiples of 16
        bytes. Hopper's kernels cannot take such rows, and other kernels sum in another order."""
        tensors = inputs(3, 21, 40, 56, dtype=dtype)
        strided = dict(tensors)
        strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("w1", "w2"):
            rows, cols = tensors[name].shape
            padded = torch.full((rows, cols + 16), float("nan"), dtype=dtype, device=DEVICE)
            padded[:, offset : offset + cols] = tensors[name]
            strided[name] = padded[:, offset : offset + cols]
        if offset % 8:
            hold(strided, impl=impl, recompute=recompute)
            return
        call = functools.partial(gelu_mlp, impl=impl, recompute=recompute)
        assert_same(run(call, strided), run(call, tensors))

    @runnable
    @pytest.mark.parametrize("rows", [1, 5, 40])
    def test_transposed_weights(self, impl: str, dtype: torch.dtype, rows: int) -> None:
        """As Conv1D's lie. Their gradients lie so too, or autograd would copy them."""
        tensors = inputs(rows, 40, 56, dtype=dtype)
        for name in ("w1", "w2"):
            tensors[name] = tensors[name].t().contiguous().t()
        hold(tensors, impl=impl)
        if impl in ("torch", "cpu"):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
            gelu_mlp(**leaves, impl=impl).sum().backward()
            assert leaves["w1"].grad.stride() == (1, 56)
            assert leaves["w2"].grad.stride() == (1, 40)

    @runnable
    def test_broadcast_row(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(1, 40, 24, dtype=dtype)
        tensors["x"] = tensors["x"].expand(7, 40)
        hold(tensors, impl=impl)


class TestZeroSizes:
    @runnable
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("sizes", [(0, 8, 16), (2, 0, 8, 16), (5, 0, 16), (5, 8, 0), (0, 0, 0)])
    def test_same_as_pytorch(
        self, impl: str, dtype: torch.dtype, recompute: bool, sizes: tuple[int, ...]
    ) -> None:
        tensors = inputs(*sizes, dtype=dtype)
        found = run(functools.partial(gelu_mlp, impl=impl, recompute=recompute), tensors)
        assert_same(found, run(baseline.gelu_mlp, tensors))


class TestDtypes:
    @runnable
    def test_weights_of_another_dtype(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(6, 10, 20)
        mixed = tensors | {"x": tensors["x"].to(dtype)}
        same = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        call = functools.partial(gelu_mlp, impl=impl)
        found, wanted = run(call, mixed), run(call, same)
        assert [t.dtype for t in found] == [dtype, dtype, FP32, FP32, FP32, FP32]
        assert_same(found, [a.to(b.dtype) for a, b in zip(wanted, found, strict=True)])


class TestRegistration:
    @each
    @pytest.mark.parametrize("biases", [False, True])
    @pytest.mark.parametrize("keep_h", [False, True])
    def test_opcheck(self, impl: str, biases: bool, keep_h: bool) -> None:
        x, w1, b1, w2, b2 = inputs(6, 10, 20, biases=biases).values()
        ops = torch.ops.gptkernels
        check_op(ops.gelu_mlp_fwd.default, (x, w1, b1, w2, b2, "tanh", keep_h, impl))
        y, h = ops.gelu_mlp_fwd(x, w1, b1, w2, b2, "tanh", True, impl)
        for grad_mask in ([True] * 5, [True, False, True, False, True]):
            arguments = (x, w1, b1, w2, h if keep_h else None, "tanh", grad_mask, impl)
            check_op(ops.gelu_mlp_bwd.default, (torch.randn_like(y), *arguments))

    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    def test_opcheck_of_transposed_weights(self, impl: str) -> None:
        x, w1, b1, w2, b2 = inputs(6, 10, 20).values()
        w1, w2 = (w.t().contiguous().t() for w in (w1, w2))
        ops = torch.ops.gptkernels
        y, h = ops.gelu_mlp_fwd(x, w1, b1, w2, b2, "tanh", True, impl)
        arguments = (x, w1, b1, w2, h, "tanh", [True] * 5, impl)
        check_op(ops.gelu_mlp_bwd.default, (torch.randn_like(y), *arguments))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
            (dict(x=torch.zeros(6, 10).long()), TypeError, "x must be float32, .* got int64"),
            (dict(w2=torch.zeros(10, 20, dtype=torch.complex64)), TypeError, "w2 .* got complex64"),
            (dict(b1=torch.zeros(20, dtype=torch.float64)), TypeError, "b1 .* got float64"),
            (dict(x=torch.zeros(())), ValueError, r"x must have shape \(\.\.\., C\)"),
            (dict(x=torch.zeros(6, 9)), ValueError, r"w1 must have shape \(F, 9\).*\(20, 10\)"),
            (dict(w1=torch.zeros(20)), ValueError, r"w1 must have shape \(F, 10\).* got \(20,\)"),
            (dict(w2=torch.zeros(20, 10)), ValueError, r"w2 must have shape \(10, 20\)"),
            (dict(b1=torch.zeros(10)), ValueError, r"b1 must have shape \(20,\)"),
            (dict(b2=torch.zeros(1, 10)), ValueError, r"b2 must have shape \(10,\)"),
            (dict(w1=torch.zeros(10, 40).t()[::2]), ValueError, "w1 must have a unit stride"),
            (dict(x=torch.zeros(10, 6).t()), ValueError, "x must have a unit stride"),
            (dict(b2=torch.zeros(10, device="meta")), ValueError, "b2 must be on the device of x"),
            (dict(approximate="sigmoid"), ValueError, "approximate must be 'tanh' or 'none'"),
            (dict(impl="cublas"), ValueError, "impl must be one of auto, .* got 'cublas'"),
        ],
    )  # fmt: skip
    def test_one_sentence(
        self, change: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        arguments = {
            k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v
            for k, v in (inputs(6, 10, 20) | change).items()
        }
        with pytest.raises(error, match=sentence) as caught:
            gelu_mlp(**arguments)
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(not INTERPRETED, reason="Triton runs natively here")
    def test_interpreter_refuses_bfloat16(self) -> None:
        with pytest.raises(RuntimeError, match=r"impl='triton': .*bfloat16"):
            gelu_mlp(**inputs(6, 10, 20, dtype=BF16), impl="triton")
