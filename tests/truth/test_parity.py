"""The parity rule: it must pass correct results and fail wrong ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import emulated, needs_cuda
from torch import Tensor

from gptkernels import bench
from gptkernels.core import native
from gptkernels.truth import parity, verify

INF, NAN = float("inf"), float("nan")


def compare(result: Tensor, baseline: Tensor, truth: Tensor) -> parity.Measurement:
    return parity.compare(result, baseline, truth, k=2.0)


def test_limit_is_the_baselines_error_and_two_ulp() -> None:
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    baseline = torch.tensor([1.5, -4.0])
    eps = torch.finfo(torch.float32).eps
    m = compare(torch.tensor([1.0, -3.0]), baseline, truth)
    assert (m.error, m.baseline_error, m.limit) == (1.0, 0.5, 2 * 0.5 + 2 * eps * 4)
    assert m.passed
    assert not compare(torch.tensor([1.0, -2.99]), baseline, truth).passed


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_result_never_passes_for_a_finite_truth(value: float) -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    m = compare(torch.tensor([1.0, value]), torch.tensor([9.0, 9.0]), truth)
    assert not m.passed
    assert m.error == INF


def test_infinities_must_stand_where_the_truth_has_them() -> None:
    truth = torch.tensor([-INF, 1.0], dtype=torch.float64)
    good = torch.tensor([-INF, 1.0])
    assert compare(good, good, truth).passed
    for wrong in (INF, NAN, 0.0, -1e38):
        assert not compare(torch.tensor([wrong, 1.0]), good, truth).passed


def test_a_baseline_that_is_wrong_proves_nothing() -> None:
    truth = torch.tensor([1.0], dtype=torch.float64)
    assert not compare(torch.tensor([1.0]), torch.tensor([NAN]), truth).passed


def test_empty_results_pass() -> None:
    empty = torch.empty(0)
    assert compare(empty, empty, empty.double()).passed


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="the result has shape"):
        compare(torch.zeros(2), torch.zeros(3), torch.zeros(3).double())


def test_measure_finds_a_wrong_gradient_and_a_wrong_output() -> None:
    def right(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    class _WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy * w, dy * x * 1.001

    inputs = dict(x=torch.randn(50), w=torch.randn(50))
    parity.assert_parity(right, right, right, inputs)
    wrong = lambda x, w: _WrongGradient.apply(x, w)  # noqa: E731
    with pytest.raises(AssertionError, match="FAIL gradient dw"):
        parity.assert_parity(wrong, right, right, inputs)
    with pytest.raises(AssertionError, match="FAIL forward output 0"):
        parity.assert_parity(lambda x, w: right(x, w) + 1e-5, right, right, inputs)


def test_cotangents_do_not_repeat_the_inputs() -> None:
    """Inputs and cotangents are drawn by generators that start from one seed."""
    cotangents: list[Tensor] = []

    def noting(x: Tensor) -> Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(cotangents.append)
        return y

    for seed in (5, 2**64 - 1):
        x = torch.randn(9, generator=torch.Generator().manual_seed(seed))
        parity.assert_parity(noting, noting, noting, dict(x=x), seed=seed)
        assert not (cotangents.pop() == x).any()


def test_poison_shows_what_nobody_wrote() -> None:
    with parity.poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.float16)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert isinstance(torch.empty, type(torch.zeros))


def test_poison_reaches_the_backward_pass() -> None:
    class _Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return torch.empty_like(dy)

    same = lambda x: x * 1  # noqa: E731
    with pytest.raises(AssertionError, match="FAIL gradient dx: error inf"):
        parity.assert_parity(lambda x: _Forgetful.apply(x), same, same, dict(x=torch.randn(5)))


def test_table_has_every_op() -> None:
    assert set(verify.OPS) == set(bench.OPERATORS)


def test_an_exception_fails_its_rows_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("out of resource: shared memory\nsecond line")

    monkeypatch.setattr("gptkernels.truth.verify.measure", broken)
    rows = list(verify.run(impls=["torch"], ops=["layer_norm"], dtypes=[torch.float32]))
    assert {row.status for row in rows} == {"fail"}
    assert rows[0].reason == "RuntimeError: out of resource: shared memory"


def test_what_an_implementation_does_not_have_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_arguments: object, **_options: object) -> None:
        raise NotImplementedError("runs with impl='torch' only")

    monkeypatch.setattr("gptkernels.truth.verify.measure", missing)
    rows = list(verify.run(impls=["torch"], ops=["attention_decode"], dtypes=[torch.float32]))
    assert {(row.direction, row.status) for row in rows} == {("forward", "skipped")}
    assert rows[0].reason == "runs with impl='torch' only"


def test_table_says_why_it_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    options = dict(impls=["cuda"], ops=["layer_norm"], dtypes=[torch.float32], device="cpu")
    rows = list(verify.run(**options))
    assert rows
    assert {row.status for row in rows} == {"skipped"}
    assert all("it runs on CUDA tensors" in row.reason for row in rows)


def test_table_refuses_an_architecture_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    with pytest.raises(ValueError, match="GPTKERNELS_EMULATE=1 in the environment"):
        verify.run(impls=["cuda"], arch="sm90")


@needs_cuda
@emulated
@pytest.mark.parametrize("before", [None, "sm80"])
def test_rows_of_an_architecture(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("GPTKERNELS_EMULATE_ARCH", raising=False)
    else:
        monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", before)
    seen: list[str | None] = []
    refusals = [("op_fwd_sm90", "no"), ("op_bwd_sm90", "never"), ("op_fwd_sm90", "no")]

    def record(run: Callable[[], None]) -> dict[str, Any]:
        seen.append(os.environ.get("GPTKERNELS_EMULATE_ARCH"))
        return emulator_record(run) | {"refusals": refusals}

    emulator_record = native.record
    monkeypatch.setattr(native, "record", record)
    options = dict(impls=["cuda"], ops=["layer_norm"], dtypes=[torch.float32])
    rows = list(verify.run(**options, arch="sm90"))
    assert set(seen) == {"sm90"}
    assert os.environ.get("GPTKERNELS_EMULATE_ARCH") == before
    assert {(row.status, row.arch) for row in rows} == {("pass", "sm90")}
    for row in rows:
        forward = row.direction == "forward"
        assert row.note == ("not op_fwd_sm90: no" if forward else "not op_bwd_sm90: never")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(impls=["gpu"]), "impl must be one of torch, triton, cuda, cpu, got 'gpu'"),
        (dict(impls=["auto"]), "impl must be"),
        (dict(seed=2**64), r"seed must lie in .* got 18446744073709551616"),
        (dict(ops=["softmax"]), "op must be one of"),
        (dict(dtypes=[torch.float64]), "dtype must be"),
        (dict(impls=["cuda"], arch="sm75"), "arch must be sm80 or sm90, got 'sm75'"),
        (dict(impls=["torch"], arch="sm90"), "it goes with impl='cuda' alone"),
        (dict(impls=["cuda", "torch"], arch="sm90"), "it goes with impl='cuda' alone"),
    ],
)
def test_table_refuses_unknown_names(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        verify.run(**options)
