"""linear_cross_entropy against the truth. test_linear_cross_entropy_rows.py tests which rows count,
and what a row may not touch; test_linear_cross_entropy_bits.py what must not change a bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import BWD, FWD, OPTIONS, bound, each, hold, in_pieces, runnable
from op_inputs import linear_cross_entropy_inputs as inputs
from right import assert_same, check_op, run
from torch import Tensor

from gptkernels import linear_cross_entropy
from gptkernels.ops.linear_cross_entropy import chunks
from gptkernels.truth import baseline, parity, reference

PLAIN = (-100, 0.0, 0.0, 0.0)


class TestParity:
    @runnable
    @given(
        rows=st.integers(33, 150),
        width=st.integers(6, 70),
        classes=st.integers(12, 150),
        bias=st.booleans(),
        ignored=st.booleans(),
        pieces=st.booleans(),
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        z_loss=st.sampled_from([0.0, 1e-3, 0.5]),
        softcap=st.sampled_from([0.0, 3.0, 30.0]),
        reduction=st.sampled_from(["none", "none", "sum", "mean"]),
        seed=st.integers(0, 2**20),
    )
    def test_any_size(
        self,
        impl: str,
        dtype: torch.dtype,
        rows: int,
        width: int,
        classes: int,
        bias: bool,
        ignored: bool,
        pieces: bool,
        seed: int,
        **options: Any,
    ) -> None:
        tensors = inputs(rows, width, classes, dtype=dtype, bias=bias, ignored=ignored, seed=seed)
        if pieces:
            with in_pieces():
                hold(tensors, seed, impl=impl, **options)
        else:
            hold(tensors, seed, impl=impl, **options)

    @runnable
    @pytest.mark.parametrize(
        "sizes",
        [(64, 32, 32), (33, 31, 31), (65, 33, 33), (2, 3, 11, 64, 64), (40, 1, 70), (40, 9, 2)],
    )
    def test_edges_of_vectors(
        self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...], seed: int
    ) -> None:
        bias = sizes[-1] > 2  # of two classes its gradient is one number, and parity is chance
        for options in ({}, OPTIONS):
            hold(inputs(*sizes, dtype=dtype, bias=bias, seed=seed), seed, impl=impl, **options)

    @runnable
    @pytest.mark.parametrize("classes", [50257, 2**16 + 5])
    def test_vocabularies(self, impl: str, dtype: torch.dtype, classes: int, seed: int) -> None:
        """The last class is a target: of more than 2^16."""
        tensors = inputs(32, 8, classes, dtype=dtype, seed=seed)
        tensors["targets"][5] = classes - 1
        hold(tensors, seed, impl=impl, label_smoothing=0.1)

    @runnable
    @pytest.mark.parametrize("rows", [32, 33, 64, 75, 100, 129])
    def test_chunks(self, impl: str, dtype: torch.dtype, rows: int, seed: int) -> None:
        """Up to five, the last one of any size. A chunk's classes, and its rows, are cut again."""
        tensors = inputs(rows, 16, 70, dtype=dtype, bias=True, seed=seed)
        with in_pieces():
            assert chunks.rows_together(rows, 16, 70, dtype.itemsize) == 32
            hold(tensors, seed, impl=impl, **OPTIONS)
            hold(tensors, seed, impl=impl, reduction="mean")

    @runnable
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("option", [{k: v} for k, v in OPTIONS.items()], ids=str)
    def test_one_option(
        self, impl: str, dtype: torch.dtype, option: dict[str, float], reduction: str, seed: int
    ) -> None:
        hold(inputs(70, 20, 45, dtype=dtype, seed=seed), seed, impl=impl, reduction=reduction,
             **option)  # fmt: skip

    @runnable
    @pytest.mark.parametrize(
        ("sizes", "options"),
        [((1, 1, 1), {}), ((1, 1, 2), {}), ((1, 1, 2), OPTIONS), ((3, 1, 31), OPTIONS),
         ((1, 33, 32), {}), ((1, 33, 32), OPTIONS)],
    )  # fmt: skip
    def test_tiny_sizes(
        self, impl: str, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, float]
    ) -> None:
        """PyTorch's error on a handful of numbers is random, so the rule is applied to the largest
        of many draws."""
        limits: dict[str, list[parity.Measurement]] = {}
        for draw in range(10):
            for measurement in parity.measure(
                functools.partial(linear_cross_entropy, impl=impl, reduction="none", **options),
                functools.partial(baseline.linear_cross_entropy, reduction="none", **options),
                functools.partial(reference.linear_cross_entropy, reduction="none", **options),
                inputs(*sizes, dtype=dtype, bias=True, seed=draw),
                seed=draw,
            ):
                limits.setdefault(measurement.name, []).append(measurement)
        for drawn in limits.values():
            assert max(m.error for m in drawn) <= max(m.limit for m in drawn), drawn

    @each
    def test_one_class_costs_nothing(self, impl: str) -> None:
        call, tensors = bound(inputs(7, 5, 1, bias=True), impl=impl, reduction="none")
        assert_same(run(call, tensors), [torch.zeros(7, device=DEVICE)] + [
            torch.zeros_like(t) for t in tensors.values()])  # fmt: skip

    @each
    @pytest.mark.parametrize("shape", [(8,), (3, 2, 8), (2, 1, 3, 2, 8), (2, 0, 3, 8)], ids=str)
    def test_any_rank(self, impl: str, shape: tuple[int, ...]) -> None:
        """A vector is one row: its loss has no dimension."""
        tensors = inputs(*shape, 12, ignored=False)
        call, floating = bound(tensors, impl=impl, reduction="none")
        found = run(call, floating)
        assert (found[0].shape, found[1].shape) == (shape[:-1], shape)
        flat = {"x": tensors["x"].reshape(-1, 8), "targets": tensors["targets"].reshape(-1)}
        call, floating = bound(tensors | flat, impl=impl, reduction="none")
        wanted = run(call, floating)
        assert_same([a.view_as(b) for a, b in zip(found, wanted, strict=True)], wanted)


class TestStrides:
    @runnable
    def test_rows_apart(self, impl: str, dtype: torch.dtype) -> None:
        """What lies between rows is NaN, and targets may lie anywhere."""
        tensors = inputs(3, 21, 40, 56, dtype=dtype, bias=True)
        strided = dict(tensors)
        strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
        strided["targets"] = tensors["targets"].t().contiguous().t()
        padded = torch.full((56, 56), torch.nan, dtype=dtype, device=DEVICE)
        padded[:, 5:45] = tensors["weight"]
        strided["weight"] = padded[:, 5:45]
        call, floating = bound(strided, impl=impl, reduction="none", **OPTIONS)
        found = run(call, floating)
        call, floating = bound(tensors, impl=impl, reduction="none", **OPTIONS)
        assert_same(found, run(call, floating))

    @runnable
    def test_rows_of_a_wider_tensor(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(40, 33, 50, dtype=dtype)
        wide = torch.full((40, 70), torch.nan, dtype=dtype, device=DEVICE)
        wide[:, 3:36] = tensors["x"]
        every_third = torch.full((120,), -7, device=DEVICE)
        every_third[::3] = tensors["targets"]
        strided = {"x": wide[:, 3:36], "targets": every_third[::3]}
        for reduction in ("none", "mean"):
            call, floating = bound(tensors | strided, impl=impl, reduction=reduction)
            found = run(call, floating)
            call, floating = bound(tensors, impl=impl, reduction=reduction)
            assert_same(found, run(call, floating))

    @runnable
    def test_broadcast_row(self, impl: str, dtype: torch.dtype) -> None:
        tensors = inputs(40, 20, 24, dtype=dtype)
        tensors["x"] = tensors["x"][:1].expand(40, 20)
        hold(tensors, impl=impl)


class TestZeroSizes:
    @runnable
    @pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 0)], ids=str)
    def test_no_rows(self, impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        for reduction, loss in (("none", None), ("sum", 0.0), ("mean", torch.nan)):
            tensors = inputs(*shape, 16, dtype=dtype, bias=True)
            call, floating = bound(tensors, impl=impl, reduction=reduction)
            found, *gradients = run(call, floating)
            if loss is None:
                assert found.shape == shape[:-1]
            else:
                torch.testing.assert_close(found.item(), loss, equal_nan=True)
            assert_same(gradients, [torch.zeros_like(t) for t in floating.values()])

    @runnable
    def test_no_columns(self, impl: str, dtype: torch.dtype) -> None:
        """Then the bias alone is the logits."""
        hold(inputs(40, 0, 16, dtype=dtype, bias=True), impl=impl)


class TestDtypes:
    @runnable
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_weights_of_another_dtype(self, impl: str, dtype: torch.dtype, reduction: str) -> None:
        tensors = inputs(40, 10, 20, bias=True)
        mixed = tensors | {"x": tensors["x"].to(dtype), "bias": tensors["bias"].to(BF16)}
        same = mixed | {name: mixed[name].to(dtype) for name in ("weight", "bias")}
        found, wanted = (
            run(*bound(given, impl=impl, reduction=reduction)) for given in (mixed, same)
        )
        assert [t.dtype for t in found] == [FP32, dtype, FP32, BF16]
        assert_same(found, [a.to(b.dtype) for a, b in zip(wanted, found, strict=True)])

    @each
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_autocast(self, impl: str, reduction: str) -> None:
        """A head in fp32 runs in 16 bits. Losses stay in fp32."""
        tensors = inputs(40, 10, 20, bias=True)
        call, floating = bound(tensors, impl=impl, reduction=reduction)

        def cast(**leaves: Any) -> Tensor:
            with torch.autocast(DEVICE, dtype=BF16):
                return call(**leaves)

        found = run(cast, floating)
        assert all(t.dtype == FP32 for t in found)
        wanted = run(call, {name: t.to(BF16) for name, t in floating.items()})
        assert_same(found, [a.to(b.dtype) for a, b in zip(wanted, found, strict=True)])


class TestRegistration:
    @each
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("options", [PLAIN, (3, 0.1, 1e-2, 3.0)], ids=["plain", "options"])
    def test_opcheck(self, impl: str, bias: bool, options: tuple[float, ...]) -> None:
        x, weight, targets, b = inputs(6, 10, 20, bias=bias, ignored=False).values()
        dloss = torch.rand(6, device=DEVICE)
        for arriving, mask in ((None, [False] * 3), (dloss, [True, True, bias])):
            check_op(FWD, (x, weight, b, targets, arriving, *options, mask, impl))
        _, lse, *_ = FWD(x, weight, b, targets, None, *options, [False] * 3, impl)
        for mask in ([True, True, bias], [True, False, False], [False, True, False]):
            check_op(BWD, (dloss, x, weight, b, targets, lse, *options, mask, impl))

    @each
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("dtype", [FP32, FP16])
    def test_on_meta(self, impl: str, reduction: str, dtype: torch.dtype) -> None:
        """The shapes and dtypes, without any memory: of logits that no machine can hold."""
        x, weight, targets = (
            torch.empty(shape, dtype=d, device="meta")
            for shape, d in (((4, 2**20, 64), dtype), ((2**20, 64), FP32),
                             ((4, 2**20), torch.int64))
        )  # fmt: skip
        x.requires_grad_()
        weight.requires_grad_()
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, impl="torch")
        assert (loss.shape, loss.dtype) == (targets.shape if reduction == "none" else (), FP32)
        loss.sum().backward()
        for t in (x, weight):
            assert (t.grad.is_meta, t.grad.shape, t.grad.dtype) == (True, t.shape, t.dtype)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


class TestBadInput:
    @pytest.mark.parametrize("impl", ["auto", "torch"])
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
            (dict(x=ones(6, 10)), TypeError, "x must be float32, .* got int64"),
            (dict(x=torch.zeros(())), ValueError, r"x must have shape \(\.\.\., C\)"),
            (dict(x=torch.zeros(10, 6).t()), ValueError, "x must have a unit stride"),
            (dict(x=torch.zeros(6, 9)), ValueError,
             r"weight must have shape \(V, 9\) with V >= 1, .* got \(20, 10\)"),
            (dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
            (dict(weight=torch.zeros(20, 10, dtype=torch.complex64)), TypeError,
             "weight must be float32, .* got complex64"),
            (dict(weight=torch.zeros(10)), ValueError, r"weight must have shape .* got \(10,\)"),
            (dict(weight=torch.zeros(0, 10)), ValueError, r"V >= 1, .* got \(0, 10\)"),
            (dict(weight=torch.zeros(10, 20).t()), ValueError, "weight must have a unit stride"),
            (dict(weight=torch.zeros(20, 10, device="meta")), ValueError,
             "weight must be on the device of x, .* got meta"),
            (dict(bias=torch.zeros(20).double()), TypeError, "bias .* got float64"),
            (dict(bias=torch.zeros(10)), ValueError, r"bias must have shape \(20,\) .* \(10,\)"),
            (dict(bias=torch.zeros(1, 20)), ValueError, r"bias must have shape \(20,\)"),
            (dict(bias=torch.zeros(40)[::2]), ValueError, "bias must have a unit stride"),
            (dict(bias=torch.zeros(20, device="meta")), ValueError, "bias must be on the device"),
            (dict(targets=[1] * 6), TypeError, "targets must be a torch.Tensor, got list"),
            (dict(targets=ones(6).int()), TypeError, "targets must be int64, got int32"),
            (dict(targets=torch.ones(6)), TypeError, "targets must be int64, got float32"),
            (dict(targets=ones(7)), ValueError, r"targets must have shape \(6,\) .* got \(7,\)"),
            (dict(targets=ones(6, 1)), ValueError, r"targets must have shape \(6,\)"),
            (dict(targets=ones(6).to("meta")), ValueError, "targets must be on the device of x"),
            (dict(ignore_index=1.0), TypeError, r"ignore_index must be an int, got 1\.0"),
            (dict(ignore_index=True), TypeError, "ignore_index must be an int, got True"),
            (dict(label_smoothing=-0.1), ValueError, "label_smoothing must be between 0 and 1"),
            (dict(label_smoothing=1.1), ValueError, "label_smoothing must .* got 1.1"),
            (dict(label_smoothing=torch.nan), ValueError, "label_smoothing must .* got nan"),
            (dict(label_smoothing=True), TypeError, "label_smoothing must be a number, got True"),
            (dict(z_loss=-1.0), ValueError, r"z_loss must be at least 0 and finite, got -1\.0"),
            (dict(z_loss=torch.nan), ValueError, "z_loss must be .* got nan"),
            (dict(z_loss="1"), TypeError, "z_loss must be a number, got '1'"),
            (dict(softcap=-1.0), ValueError, r"softcap must be at least 0 and finite, got -1\.0"),
            (dict(softcap=torch.inf), ValueError, "softcap must be .* got inf"),
            (dict(softcap=None), TypeError, "softcap must be a number, got None"),
            (dict(reduction="avg"), ValueError,
             "reduction must be 'none', 'sum' or 'mean', got 'avg'"),
            (dict(reduction=None), ValueError, "reduction must be .* got None"),
        ],
    )  # fmt: skip
    def test_one_sentence(
        self, change: dict[str, Any], error: type[Exception], sentence: str, impl: str
    ) -> None:
        arguments = {
            k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v
            for k, v in (inputs(6, 10, 20, bias=True) | change).items()
        }
        with pytest.raises(error, match=f"^{sentence}" if " must" in sentence else sentence) as e:
            linear_cross_entropy(**arguments, impl=impl)
        assert "\n" not in str(e.value)

    def test_unknown_impl(self) -> None:
        with pytest.raises(ValueError, match=r"^impl must be one of auto, .* got 'cublas'"):
            linear_cross_entropy(**inputs(6, 10, 20), impl="cublas")

    @pytest.mark.skipif(DEVICE != "cpu", reason="to read them would wait for a GPU")
    @pytest.mark.parametrize("impl", ["auto", "torch"])
    @pytest.mark.parametrize("wrong", [20, -1, -101, 2**40, -(2**63)])
    def test_targets_that_are_no_class(self, wrong: int, impl: str) -> None:
        tensors = inputs(6, 10, 20)
        linear_cross_entropy(**tensors, impl=impl)  # a call of its signature that is right
        tensors["targets"][3] = wrong
        sentence = rf"^targets must lie in 0...19 \(V - 1\) or be ignore_index, -100, got {wrong}$"
        with pytest.raises(ValueError, match=sentence):
            linear_cross_entropy(**tensors, impl=impl)
        tensors["targets"][1::5] = 0
        linear_cross_entropy(**tensors, ignore_index=wrong, impl=impl)
