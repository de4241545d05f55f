"""layer_norm against the truth, in every implementation that runs here."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import BF16, FP32, each, each_kernel, runnable
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import layer_norm_inputs
from right import assert_gradients_alone, assert_right, assert_same, check_op, run, seeded

from gptkernels import layer_norm
from gptkernels.core import philox
from gptkernels.ops.layer_norm.op import layer_norm_bwd
from gptkernels.truth import verify

hold = functools.partial(assert_right, layer_norm)


@runnable
@pytest.mark.parametrize(
    "case", [c for c in verify.CASES if c.op == "layer_norm"], ids=lambda c: c.name
)
def test_table_of_cases(
    case: verify.Case, impl: str, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    failures = [m for m in verify.measure(case, impl, dtype, device, seed) if not m.passed]
    assert not failures, "\n".join(map(str, failures))


@runnable
@given(data=st.data())
def test_random_shapes_and_options(impl: str, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=2), label="leading")
    # These widths lie on both sides of the tile widths 16, 32, ... and take both philox paths, for
    # C % 8 == 0 and for other C.
    C = data.draw(st.integers(3, 300) | st.sampled_from([16, 64, 256, 1024, 1025]), label="C")
    if C < 16:
        # The largest error of a handful of values is random, PyTorch's too, so compare more rows.
        shape = [*shape, 31]
    residual_dtype = data.draw(st.sampled_from([None, dtype, FP32]), label="residual")
    weight_dtype = data.draw(st.sampled_from([dtype, FP32]), label="weight")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    torch.manual_seed(seed)
    hold(
        layer_norm_inputs(
            *shape,
            C,
            dtype=dtype,
            weight=weight_dtype,
            bias=data.draw(st.booleans(), label="bias"),
            residual=residual_dtype,
        ),
        seed,
        impl=impl,
        dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="dropout_p"),
        prenorm=data.draw(st.booleans(), label="prenorm"),
        residual_in_fp32=data.draw(st.booleans(), label="residual_in_fp32"),
        eps=data.draw(st.sampled_from([1e-5, 1e-3]), label="eps"),
    )


@each
@pytest.mark.parametrize("C", [200, 9001])
def test_large_mean(C: int, impl: str, seed: int) -> None:
    """Here E[x^2] - mean^2 would lose its digits by cancellation, and 16-bit statistics would be
    wrong by the rounding of the mean. An fp32 mean is wrong too, in one draw of ten, unless the
    centred row corrects it."""
    for draw in range(20 if C < 1000 else 1):
        torch.manual_seed(seed + draw)
        inputs = layer_norm_inputs(7, C)
        hold(inputs | dict(x=inputs["x"] + 1000), seed, impl=impl)


@each
@pytest.mark.parametrize(("C", "compiled"), [(4, False), (96, False), (96, True)])
def test_large_mean_costs_dx_no_digits(
    C: int, compiled: bool, impl: str, device: torch.device
) -> None:
    """With exact statistics dx is right to the last bits, however large the mean is."""
    call = layer_norm_bwd
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(layer_norm_bwd, fullgraph=True, backend="aot_eager")
    deviations = torch.randn(64, C // 2, dtype=torch.float64).mul(1024).round().div(1024)
    s = 2000 + torch.cat((deviations, -deviations), dim=1)  # 2000 is the exact mean
    dy, weight = torch.randn(64, C), torch.randn(C)
    rstd = (s.var(dim=1, unbiased=False) + 1e-5).rsqrt()
    arguments = (dy, None, s.float(), torch.full((64,), 2000.0), rstd.float(), weight)
    dx, *_ = call(
        *(x if x is None else x.to(device) for x in arguments),
        None, 0.0, FP32, None, False, False, impl,
    )  # fmt: skip
    g, normal = dy.double() * weight, (s - 2000) * rstd[:, None]
    terms = (g, -g.mean(1, keepdim=True), -normal * (g * normal).mean(1, keepdim=True))
    truth, largest = (rstd[:, None] * total for total in (sum(terms), sum(map(torch.abs, terms))))
    assert ((dx.cpu() - truth).abs() <= 2 * torch.finfo(FP32).eps * largest.amax()).all()


@runnable
def test_many_rows_add_up(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    """A sum of ones in 16 bits stops to grow at 256 (bfloat16) or at 2048 (float16)."""
    M, C = 2560, 16
    dy, mean = torch.ones(M, C, dtype=dtype, device=device), torch.zeros(M, device=device)
    s = dy * torch.tensor([-1.0, 1.0], device=device).repeat(C // 2).to(dtype)
    *_, dweight, dbias = torch.ops.gptkernels.layer_norm_bwd(
        dy, None, s, mean, mean + 1, dy[0], None, 0.0, dtype, None, True, True, impl
    )
    assert torch.equal(dweight, M * s[0])
    assert torch.equal(dbias, M * dy[0])


@each_kernel
@pytest.mark.parametrize("C", [8201, 8200])
def test_wide_rows(C: int, impl: str, device: torch.device, seed: int) -> None:
    x, residual, weight, bias = (
        torch.randn(*s, device=device) for s in ((2, C + 99), (2, C), (C,), (C,))
    )
    inputs = dict(x=x[:, :C], weight=weight, bias=bias)
    hold(inputs, seed, impl=impl)
    hold(inputs | dict(residual=residual), seed, prenorm=True, dropout_p=0.1, impl=impl)


@runnable
def test_statistics_are_saved_in_fp32(
    impl: str, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    x = (torch.randn(40, 96, device=device) * 3 + 20).to(dtype)
    weight = torch.ones(96, dtype=dtype, device=device)
    _, _, mean, rstd = torch.ops.gptkernels.layer_norm_fwd(
        x, weight, None, None, None, 0.0, 1e-5, None, impl
    )
    exact = x.double()
    exact_rstd = (exact.var(dim=-1, unbiased=False) + 1e-5).rsqrt()
    assert mean.dtype == rstd.dtype == FP32
    # The mean of 96 numbers in fp32 has an error of at most 8 ulp, summed pairwise or in sequence.
    eps = torch.finfo(FP32).eps
    assert ((mean - exact.mean(dim=-1)).abs() <= 8 * eps * exact.abs().mean(dim=-1)).all()
    assert ((rstd - exact_rstd).abs() <= 64 * eps * exact_rstd).all()


def test_more_partial_sums_than_one_block_reduces(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are 66 programs, some with two tiles of rows. The second stage adds the sums of 64
    programs at a time."""
    kernels = pytest.importorskip("gptkernels.ops.layer_norm.triton.launch")
    monkeypatch.setattr(kernels, "multiprocessors", lambda _tensor: 66)
    C = 8192  # a tile has one row, a multiprocessor one program
    hold(layer_norm_inputs(70, C), seed, impl="triton")


@each
def test_strided_rows(impl: str, device: torch.device, seed: int) -> None:
    base = torch.randn(6, 5, 80, device=device)
    weight = torch.randn(40, device=device)
    views = {
        "row stride": base[:, 0, :40],
        "both leading dimensions": base[:, ::2, 10:50],
        "transposed leading dimensions": base.transpose(0, 1)[..., :40],
        "expanded": base[:1, :1, :40].expand(4, 3, 40),
        "transposed last dimension": base[0, :, :40].T.contiguous().T,
    }
    for view in views.values():
        residual = torch.randn(view.shape, device=device)
        inputs = dict(x=view, weight=weight, bias=None, residual=residual)
        hold(inputs, seed, prenorm=True, impl=impl)
        hold(dict(x=residual, weight=weight, bias=None, residual=view), seed, impl=impl)
        hold(dict(x=view, weight=weight, bias=None), seed, impl=impl)  # here s is the view
    every_other, repeated = torch.randn(80, device=device)[::2], torch.randn(1, device=device)
    parameters = dict(weight=every_other, bias=repeated.expand(40))
    hold(dict(x=base[0, :, :40], **parameters), seed, impl=impl)


@each
def test_gradients_of_one_output_only(impl: str, device: torch.device, seed: int) -> None:
    x, weight, residual = (
        torch.randn(*s, device=device, requires_grad=True) for s in ((3, 40), (40,), (3, 40))
    )
    y, s = layer_norm(x, weight, residual=residual, prenorm=True, impl=impl)
    dx, dresidual = torch.autograd.grad(s.sum(), (x, residual), retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(x), rtol=0, atol=0)
    torch.testing.assert_close(dresidual, torch.ones_like(x), rtol=0, atol=0)
    only_y = torch.autograd.grad(y.square().sum(), (x, weight))
    both = torch.autograd.grad(
        layer_norm(x, weight, residual=residual, impl=impl).square().sum(), (x, weight)
    )
    assert_same(only_y, both)


@each
def test_one_column_gives_the_bias(impl: str, device: torch.device, seed: int) -> None:
    x, weight, bias = (torch.randn(*s, device=device) for s in ((5, 1), (1,), (1,)))
    assert torch.equal(layer_norm(x, weight, bias, impl=impl), bias.expand(5, 1))


@runnable
@pytest.mark.parametrize("bias", [None, FP32])
def test_no_weight_means_ones(
    impl: str, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, seed: int
) -> None:
    x = torch.randn(5, 40, device=device).to(dtype)
    given = dict(x=x) if bias is None else dict(x=x, bias=torch.randn(40, device=device))
    call = functools.partial(layer_norm, impl=impl)
    ones = torch.ones(40, dtype=bias or dtype, device=device)
    assert_same(
        run(functools.partial(call, weight=None), given),
        run(functools.partial(call, weight=ones), given),
    )


@each
def test_no_rows(impl: str, device: torch.device) -> None:
    x = torch.empty(0, 3, 64, device=device, requires_grad=True)
    weight = torch.randn(64, device=device, requires_grad=True)
    bias = torch.randn(64, device=device, requires_grad=True)
    y, s = layer_norm(x, weight, bias, residual=x.detach(), prenorm=True, impl=impl)
    assert y.shape == s.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


@each
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(impl: str, poison: float, device: torch.device, seed: int) -> None:
    x = torch.randn(20, 96, device=device, requires_grad=True)
    weight = torch.randn(96, device=device)
    dirty = x.detach().clone()
    dirty[7, 11] = poison
    dirty.requires_grad_()
    clean_y, dirty_y = (layer_norm(t, weight, impl=impl) for t in (x, dirty))
    others = torch.arange(20, device=device) != 7
    assert dirty_y[7].isnan().all()
    assert torch.equal(dirty_y[others], clean_y[others])
    clean_y.sum().backward()
    dirty_y.sum().backward()
    assert torch.equal(dirty.grad[others], x.grad[others])


@each
def test_dropped_values_never_leak(impl: str, device: torch.device, seed: int) -> None:
    x = torch.randn(8, 64, device=device)
    torch.manual_seed(seed)
    keep = philox.elementwise_keep(philox.draw(device), 0.5, x.shape)
    poisoned = x.masked_fill(~keep, float("nan"))
    weight = torch.ones(64, device=device)
    call = seeded(functools.partial(layer_norm, dropout_p=0.5, prenorm=True, impl=impl), seed)
    assert_same(call(poisoned, weight), call(x, weight))


@each
def test_same_input_same_bits(impl: str, seed: int) -> None:
    inputs = layer_norm_inputs(70, 96)
    call = seeded(functools.partial(layer_norm, dropout_p=0.3, impl=impl), seed)
    first = run(call, inputs)
    for _ in range(2):
        assert_same(run(call, inputs), first)


@each_kernel
@pytest.mark.parametrize("C", [104, 99])
def test_implementations_drop_the_same_elements(
    C: int, impl: str, device: torch.device, seed: int
) -> None:
    x, dropped = torch.randn(9, C, device=device), []
    for one in ("torch", impl):
        torch.manual_seed(seed)
        options = dict(dropout_p=0.4, prenorm=True, impl=one)
        dropped.append(layer_norm(x, torch.ones(C, device=device), **options)[1] == 0)
    assert torch.equal(*dropped)


@each
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(impl: str, dropout_p: float, residual: bool, device: torch.device) -> None:
    inputs = layer_norm_inputs(4, 6, 24, residual=FP32 if residual else None)
    x, weight = inputs["x"], inputs["weight"]
    rng = philox.draw(device) if dropout_p else None
    sum_dtype = FP32 if residual or dropout_p else None
    forward = (*inputs.values(), rng, dropout_p, 1e-5, sum_dtype, impl)
    check_op(torch.ops.gptkernels.layer_norm_fwd.default, forward)
    statistics = torch.rand(24, device=device)
    residual_dtype = BF16 if residual else None
    for wanted in ((True, True), (True, False), (False, False)):
        options = (weight, rng, dropout_p, x.dtype, residual_dtype, *wanted, impl)
        backward = (x, x if residual else None, x, statistics, statistics, *options)
        check_op(torch.ops.gptkernels.layer_norm_bwd.default, backward)


@each
@pytest.mark.parametrize("C", [40, 8200])
def test_only_the_gradients_asked_for(C: int, impl: str, seed: int) -> None:
    inputs = layer_norm_inputs(2, C, residual=FP32)
    assert_gradients_alone(functools.partial(layer_norm, impl=impl), inputs)


def test_autocast_leaves_dtypes_alone(device: torch.device, seed: int) -> None:
    """Under autocast an fp32 residual stream stays fp32 beside 16-bit branches. layer_norm converts
    nothing that the caller did not ask for."""
    weight = torch.randn(32, device=device)
    branch = torch.randn(4, 32, device=device).bfloat16()
    stream = torch.randn(4, 32, device=device)
    with torch.autocast(device.type, BF16):
        y, s = layer_norm(branch, weight, residual=stream, prenorm=True)
        narrow = layer_norm(branch, weight.bfloat16())
    assert (y.dtype, s.dtype) == (BF16, FP32)
    assert torch.equal(narrow, layer_norm(branch, weight.bfloat16()))
    hold(dict(x=branch, weight=weight, residual=stream), seed, impl="torch")


def _bad(**changes: Any) -> dict[str, Any]:
    good = dict(x=torch.zeros(2, 8), weight=torch.ones(8), bias=torch.zeros(8))
    return {**good, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (_bad(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x must be float32, bfloat16 or"),
        (_bad(x=torch.zeros(2, 8, dtype=torch.complex64)), TypeError, "got complex64"),
        (_bad(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (_bad(x=torch.tensor(1.0)), ValueError, r"x must have shape \(..., C\)"),
        (_bad(x=torch.zeros(2, 0)), ValueError, r"x must have shape \(..., C\) with C >= 1"),
        (_bad(weight=torch.ones(7)), ValueError, r"weight must have shape \(8,\).*got \(7,\)"),
        (_bad(weight=torch.ones(1, 8)), ValueError, r"weight must have shape \(8,\)"),
        (_bad(weight=torch.ones(8).double()), TypeError, "weight must be float32.*got float64"),
        (_bad(weight=torch.ones(8, device="meta")), ValueError, "weight must be on the device"),
        (_bad(bias=torch.zeros(9)), ValueError, "bias must have shape"),
        (_bad(bias=torch.zeros(8).half()), TypeError, "bias must have the dtype of weight"),
        (_bad(residual=torch.zeros(8)), ValueError, "residual must have shape"),
        (_bad(residual=torch.zeros(2, 8, dtype=torch.int64)), TypeError, "residual must be float"),
        (_bad(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        (_bad(dropout_p=float("nan")), ValueError, "dropout_p must be between 0 and 1"),
        (_bad(eps=0.0), ValueError, "eps must be positive, got 0.0"),
        (_bad(impl="cudnn"), ValueError, "impl must be one of auto, torch, triton, cuda, cpu"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        layer_norm(**arguments)
