"""layer_norm against the truth, in every implementation that runs here."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gptkernels import layer_norm
from gptkernels.core import native, philox
from gptkernels.core.choice import unavailable
from gptkernels.truth import baseline, parity, reference, verify

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_CUDA = unavailable("cuda", DEVICE, torch.float32)
needs_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=f"impl='cuda': {NO_CUDA}")
CUDA = pytest.param("cuda", marks=needs_cuda)
IMPLS = ("torch", "triton", CUDA)
KERNELS = ("triton", CUDA)


def skip_unless_usable(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = unavailable(impl, device.type, dtype)
    if reason:
        pytest.skip(reason)


def assert_layer_norm(impl: str, inputs: dict[str, Any], seed: int = 0, **options: Any) -> None:
    torch.manual_seed(seed)
    rng = philox.draw(inputs["x"].device)

    def candidate(**leaves: Any) -> Any:
        torch.manual_seed(seed)
        return layer_norm(**leaves, **options, impl=impl)

    parity.assert_parity(
        candidate,
        functools.partial(baseline.layer_norm, **options, rng=rng),
        functools.partial(reference.layer_norm, **options, rng=rng),
        inputs,
        names=("y", "s"),
        seed=seed,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in verify.CASES if c.op == "layer_norm"], ids=lambda c: c.name
)
def test_table_of_cases(
    case: verify.Case, impl: str, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    skip_unless_usable(impl, device, dtype)
    failures = [m for m in verify.measure(case, impl, dtype, device, seed) if not m.passed]
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@given(data=st.data())
def test_random_shapes_and_options(
    impl: str, dtype: torch.dtype, device: torch.device, data: st.DataObject
) -> None:
    skip_unless_usable(impl, device, dtype)
    shape = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=2), label="leading")
    # Straddles the tile widths 16, 32, ... and both philox paths (C % 8).
    C = data.draw(st.integers(3, 300) | st.sampled_from([16, 64, 256, 1024, 1025]), label="C")
    if C < 16:
        # The largest error of a handful of values is luck, PyTorch's too: compare over many.
        shape = [*shape, 31]
    residual_dtype = data.draw(st.sampled_from([None, dtype, torch.float32]), label="residual")
    weight_dtype = data.draw(st.sampled_from([dtype, torch.float32]), label="weight")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    torch.manual_seed(seed)
    randn = functools.partial(torch.randn, device=device)
    inputs = dict(
        x=(randn(*shape, C) + 0.5).to(dtype),
        weight=randn(C).to(weight_dtype),
        bias=randn(C).to(weight_dtype) if data.draw(st.booleans(), label="bias") else None,
        residual=None if residual_dtype is None else randn(*shape, C).to(residual_dtype),
    )
    assert_layer_norm(
        impl,
        inputs,
        seed,
        dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="dropout_p"),
        prenorm=data.draw(st.booleans(), label="prenorm"),
        residual_in_fp32=data.draw(st.booleans(), label="residual_in_fp32"),
        eps=data.draw(st.sampled_from([1e-5, 1e-3]), label="eps"),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("C", [200, 9001])
def test_large_mean(C: int, impl: str, device: torch.device, seed: int) -> None:
    """E[x^2] - mean^2 would cancel here, 16-bit statistics would be off by the mean's rounding,
    and so is an fp32 mean, in one draw of ten, unless the centred row corrects it."""
    for draw in range(20 if C < 1000 else 1):
        torch.manual_seed(seed + draw)
        inputs = dict(
            x=torch.randn(7, C, device=device) + 1000,
            weight=torch.randn(C, device=device),
            bias=torch.randn(C, device=device),
        )
        assert_layer_norm(impl, inputs, seed)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("C", [8201, 8200])
def test_wide_rows(C: int, impl: str, device: torch.device, seed: int) -> None:
    x, residual, weight, bias = (
        torch.randn(*s, device=device) for s in ((2, C + 99), (2, C), (C,), (C,))
    )
    inputs = dict(x=x[:, :C], weight=weight, bias=bias)
    assert_layer_norm(impl, inputs, seed)
    assert_layer_norm(impl, inputs | dict(residual=residual), seed, prenorm=True, dropout_p=0.1)


@needs_cuda
class TestCuda:
    """What the CUDA C++ kernels do differently from one width, alignment or dtype to the next."""

    # Around a group of 8 columns, the 256 of a warp, the rows that several warps share (above 1,792
    # forward, 1,024 backward), and those that no registers hold (above 8,192 backward).
    NARROW = (1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 511, 768, 1023, 1024, 1025, 1280, 1600)
    WIDE = (1792, 1800, 2049, 3000, 4096, 8191, 8192, 8200)

    @pytest.mark.parametrize("C", NARROW + WIDE)
    def test_widths(self, C: int, device: torch.device, seed: int) -> None:
        dtypes = DTYPES if C in (768, 1024, 1600) else DTYPES[seed % 3 :][:1]
        M = 33 if C < 64 else 5  # the largest error of a handful of values is luck
        for dtype in dtypes:
            x, residual = (torch.randn(M, C, device=device).to(dtype) for _ in range(2))
            weight, bias = (torch.randn(C, device=device).to(dtype) for _ in range(2))
            inputs = dict(x=x, weight=weight, bias=bias)
            assert_layer_norm("cuda", inputs, seed)
            inputs |= dict(residual=residual)
            assert_layer_norm("cuda", inputs, seed, prenorm=True, dropout_p=0.25)

    @pytest.mark.parametrize(
        ("C", "dtype"),
        [
            (28_672, torch.float32), (28_680, torch.float32), (32_768, torch.bfloat16),
            (32_776, torch.float16), (65_536, torch.float32), (65_536, torch.bfloat16),
            (65_537, torch.float16),
        ],
    )  # fmt: skip
    def test_widest_rows(self, C: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        """Forward: the last that stay in registers (28,672 of a fp32 s, 32,768 of a 16-bit one),
        and those that are read three times."""
        x, residual = (torch.randn(2, C, device=device).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(C, device=device).to(dtype) for _ in range(2))
        inputs = dict(x=x, weight=weight, bias=bias, residual=residual)
        assert_layer_norm("cuda", inputs, seed, prenorm=True, dropout_p=0.1)

    @pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
    def test_mixtures_of_dtypes(
        self,
        x_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        for weight_dtype in DTYPES:
            for C in (48, 51):
                x, residual = (torch.randn(19, C, device=device) for _ in range(2))
                inputs = dict(
                    x=x.to(x_dtype),
                    residual=residual.to(residual_dtype),
                    weight=torch.randn(C, device=device).to(weight_dtype),
                    bias=torch.randn(C, device=device).to(weight_dtype),
                )
                options = dict(prenorm=True, residual_in_fp32=(seed + C) % 2 == 0)
                assert_layer_norm("cuda", inputs, seed, dropout_p=0.3 * (seed % 2), **options)

    @pytest.mark.parametrize("C", [64, 640, 2560, 8200])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_rows_that_are_not_aligned(
        self, C: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        """Of one operand alone, by its address or by its stride: nothing is read 16 bytes at a
        time then."""
        base = torch.randn(2, C + 13, device=device).to(dtype)
        vector = torch.randn(C + 1, device=device).to(dtype)
        views = {
            "aligned": (base[:, :C].contiguous(), vector[:C]),
            "address of x": (base.flatten()[1 : 1 + 2 * C].view(2, C), vector[:C]),
            "stride of x": (base[:, :C], vector[:C]),
            "address of weight": (base[:, :C].contiguous(), vector[1:]),
        }
        for x, weight in views.values():
            residual = base.flatten()[3 : 3 + 2 * C].view(2, C)
            assert_layer_norm("cuda", dict(x=x, weight=weight), seed)
            inputs = dict(x=x, weight=weight, bias=weight, residual=x)
            assert_layer_norm("cuda", inputs, seed, prenorm=True, dropout_p=0.1)
            assert_layer_norm("cuda", inputs | dict(residual=residual), seed)

    @pytest.mark.parametrize(
        ("M", "C"),
        [
            (403, 40), (403, 39),  # four rows a CTA forward, ten CTAs of four rows in turn backward
            (50, 776), (9, 1032), (30, 1025),  # one warp a row; two rows of two warps; not aligned
            (11, 2304), (13, 3000),  # one row of three warps
        ],
    )  # fmt: skip
    def test_more_rows_than_ctas(self, M: int, C: int, device: torch.device, seed: int) -> None:
        x, weight, bias = (torch.randn(*s, device=device) for s in ((M, C), (C,), (C,)))
        inputs = dict(x=x, weight=weight, bias=bias)
        assert_layer_norm("cuda", inputs, seed)
        inputs = {k: v.bfloat16() for k, v in inputs.items()} | dict(residual=x)
        assert_layer_norm("cuda", inputs, seed, prenorm=True, dropout_p=0.2)

    @pytest.mark.parametrize("C", [40, 8200])
    @pytest.mark.parametrize("partials", [1, 2, 32, 33, 70])
    def test_any_number_of_partial_sums(
        self,
        partials: int,
        C: int,
        device: torch.device,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The second stage adds up 32 at a time; a CTA with no row has sums of zero."""
        count = "layer_norm_bwd_partials"
        monkeypatch.setattr(native.module(), count, lambda *_sizes: partials)
        x, weight, bias = (torch.randn(*s, device=device) for s in ((37, C), (C,), (C,)))
        assert_layer_norm("cuda", dict(x=x, weight=weight, bias=bias), seed)

    @pytest.mark.parametrize("C", [40, 41, 8200])
    def test_only_one_weight_gradient(self, C: int, device: torch.device, seed: int) -> None:
        """In the op itself: dweight alone, dbias alone."""
        x, weight = torch.randn(9, C, device=device), torch.randn(C, device=device)
        _, _, mean, rstd = torch.ops.gptkernels.layer_norm_fwd(
            x, weight, None, None, None, 0.0, 1e-5, None, "cuda"
        )
        dy = torch.randn(9, C, device=device)
        given = (dy, None, x, mean, rstd, weight, None, 0.0, x.dtype, None)
        both, dweight, dbias = (
            torch.ops.gptkernels.layer_norm_bwd(*given, *wanted, "cuda")
            for wanted in ((True, True), (True, False), (False, True))
        )
        assert torch.equal(dweight[2], both[2])
        assert torch.equal(dbias[3], both[3])
        assert dweight[3].numel() == dbias[2].numel() == 0
        assert torch.equal(dweight[0], both[0])

    @pytest.mark.skipif(not native.EMULATED, reason="a GPU has one schedule")
    @pytest.mark.parametrize("C", [40, 1032, 2304, 8200])
    def test_any_schedule_gives_the_same_bits(
        self, C: int, device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, weight = torch.randn(9, C, requires_grad=True), torch.randn(C, requires_grad=True)
        results = []
        for schedule in ("forward", "reverse", str(seed)):
            monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
            y = layer_norm(x, weight, impl="cuda")
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_constant_rows(self, device: torch.device) -> None:
        """No variance, with and without rounding in the mean: y is the bias."""
        for C in (104, 101, 300, 779, 1784):
            bias = torch.randn(C, device=device)
            x = torch.cat((torch.randn(12), torch.tensor([0.0, 1.0, 1e4 / 3, 1e15])))[:, None]
            x = x.to(device).expand(16, C)
            y = layer_norm(x, torch.ones(C, device=device), bias, eps=1e-30, impl="cuda")
            assert torch.equal(y, bias.expand(16, C))

    def test_sums_of_other_dtypes_are_refused(self, device: torch.device) -> None:
        """They do not come from the public function."""
        x, weight = torch.zeros(2, 8, device=device).half(), torch.ones(8, device=device)
        sentence = r"x \(2, 8\) fp16: the sum must have the dtype of x, or fp32"
        for residual, dtype in ((x.float(), x.dtype), (x, torch.bfloat16)):
            options = (weight, None, residual, None, 0.0, 1e-5, dtype, "cuda")
            with pytest.raises(RuntimeError, match=f"layer_norm_fwd on {sentence}"):
                torch.ops.gptkernels.layer_norm_fwd(x, *options)
        statistics = torch.ones(2, device=device)
        options = (statistics, statistics, weight, None, 0.0, x.dtype, None, True, True, "cuda")
        with pytest.raises(RuntimeError, match=f"layer_norm_bwd on {sentence}"):
            torch.ops.gptkernels.layer_norm_bwd(x, None, x.bfloat16(), *options)

    def test_too_many_columns(self, device: torch.device) -> None:
        x = torch.zeros(1, device=device).expand(1, 2**30 + 8)
        with pytest.raises(NotImplementedError, match=r"up to 2\*\*30 columns, got 1073741832"):
            layer_norm(x, x[0], impl="cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_saved_in_fp32(
    impl: str, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    skip_unless_usable(impl, device, dtype)
    x = (torch.randn(40, 96, device=device) * 3 + 20).to(dtype)
    weight = torch.ones(96, dtype=dtype, device=device)
    _, _, mean, rstd = torch.ops.gptkernels.layer_norm_fwd(
        x, weight, None, None, None, 0.0, 1e-5, None, impl
    )
    exact = x.double()
    exact_rstd = (exact.var(dim=-1, unbiased=False) + 1e-5).rsqrt()
    assert mean.dtype == rstd.dtype == torch.float32
    # A mean of 96 addends in fp32: pairwise or sequential, 8 ulp bounds both.
    eps = torch.finfo(torch.float32).eps
    assert ((mean - exact.mean(dim=-1)).abs() <= 8 * eps * exact.abs().mean(dim=-1)).all()
    assert ((rstd - exact_rstd).abs() <= 64 * eps * exact_rstd).all()


def test_more_partial_sums_than_one_block_reduces(
    device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """66 programs, some with two tiles of rows; the second stage adds 64 programs at a time."""
    kernels = pytest.importorskip("gptkernels.ops.layer_norm.triton.launch")
    monkeypatch.setattr(kernels, "multiprocessors", lambda _tensor: 66)
    C = 8192  # one row a tile, one program a multiprocessor
    x, weight, bias = (torch.randn(*s, device=device) for s in ((70, C), (C,), (C,)))
    assert_layer_norm("triton", dict(x=x, weight=weight, bias=bias), seed)


@pytest.mark.parametrize("impl", IMPLS)
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
        assert_layer_norm(impl, inputs, seed, prenorm=True)
        assert_layer_norm(impl, dict(x=residual, weight=weight, bias=None, residual=view), seed)
        assert_layer_norm(impl, dict(x=view, weight=weight, bias=None), seed)  # s is the view
    every_other, repeated = torch.randn(80, device=device)[::2], torch.randn(1, device=device)
    parameters = dict(weight=every_other, bias=repeated.expand(40))
    assert_layer_norm(impl, dict(x=base[0, :, :40], **parameters), seed)


@pytest.mark.parametrize("impl", IMPLS)
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
    for a, b in zip(only_y, both, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_column_gives_the_bias(impl: str, device: torch.device, seed: int) -> None:
    x, weight, bias = (torch.randn(*s, device=device) for s in ((5, 1), (1,), (1,)))
    assert torch.equal(layer_norm(x, weight, bias, impl=impl), bias.expand(5, 1))


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_dropped_values_never_leak(impl: str, device: torch.device, seed: int) -> None:
    x = torch.randn(8, 64, device=device)
    torch.manual_seed(seed)
    keep = philox.elementwise_keep(philox.draw(device), 0.5, x.shape)
    poisoned = x.masked_fill(~keep, float("nan"))
    weight = torch.ones(64, device=device)
    results = []
    for values in (x, poisoned):
        torch.manual_seed(seed)
        results.append(layer_norm(values, weight, dropout_p=0.5, prenorm=True, impl=impl))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_same_bits(impl: str, device: torch.device, seed: int) -> None:
    leaves = [torch.randn(*s, device=device, requires_grad=True) for s in ((70, 96), (96,), (96,))]
    first: list[Tensor] | None = None
    for _ in range(3):
        torch.manual_seed(seed)
        y = layer_norm(*leaves, dropout_p=0.3, impl=impl)
        results = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@pytest.mark.parametrize("impl", KERNELS)
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


def _sample(device: torch.device, dropout_p: float, residual: bool) -> tuple[tuple[Any, ...], int]:
    x, weight = torch.randn(4, 6, 24, device=device), torch.randn(24, device=device)
    rng = philox.draw(device) if dropout_p else None
    second = torch.randn(4, 6, 24, device=device) if residual else None
    sum_dtype = torch.float32 if residual or dropout_p else None
    return (x, weight, weight * 2, second, rng, dropout_p, 1e-5, sum_dtype), 24


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(impl: str, dropout_p: float, residual: bool, device: torch.device) -> None:
    arguments, rows = _sample(device, dropout_p, residual)
    x, weight, _, _, rng, *_ = arguments
    torch.library.opcheck(torch.ops.gptkernels.layer_norm_fwd.default, (*arguments, impl))
    statistics = torch.rand(rows, device=device)
    residual_dtype = torch.bfloat16 if residual else None
    for wanted in ((True, True), (True, False), (False, False)):
        options = (weight, rng, dropout_p, x.dtype, residual_dtype, *wanted, impl)
        backward = (x, x if residual else None, x, statistics, statistics, *options)
        torch.library.opcheck(torch.ops.gptkernels.layer_norm_bwd.default, backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("C", [40, 8200])
def test_only_the_gradients_asked_for(
    C: int, impl: str, device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = dict(x=(2, C), weight=(C,), bias=(C,), residual=(2, C))
    values = {name: torch.randn(*shape, device=device) for name, shape in shapes.items()}

    def gradients(*wanted: str) -> dict[str, Tensor]:
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in values.items()}
        layer_norm(**leaves, impl=impl).square().sum().backward()
        return {k: v.grad for k, v in leaves.items() if v.grad is not None}

    every = gradients(*shapes)
    for name in shapes:
        alone = gradients(name)
        assert list(alone) == [name]
        assert torch.equal(alone[name], every[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_compile_equals_eager(impl: str, device: torch.device, seed: int) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y, s = layer_norm(x, weight, bias, residual=residual, prenorm=True, impl=impl)
        y = layer_norm(y, weight, residual=s, dropout_p=0.25, impl=impl)
        return layer_norm(y, weight, bias, impl=impl)  # its s is y: an empty tensor inside the op

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    # Inductor has its own random numbers unless told to fall back to eager's.
    with torch._inductor.config.patch(fallback_random=True):
        for rows in (3, 5):
            leaves = [
                torch.randn(*s, device=device, requires_grad=True)
                for s in ((rows, 48), (48,), (48,), (rows, 48))
            ]
            results = []
            for function in (block, compiled):
                torch.manual_seed(seed)
                y = function(*leaves)
                results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            for eager, found in zip(*results, strict=True):
                torch.testing.assert_close(found, eager)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_replays_dropout(impl: str, device: torch.device, seed: int) -> None:
    x = torch.randn(6, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    run = functools.partial(layer_norm, dropout_p=0.5, impl=impl)
    torch.manual_seed(seed)
    plain = torch.autograd.grad(run(x, weight).square().sum(), (x, weight))
    torch.manual_seed(seed)
    y = checkpoint(run, x, weight, use_reentrant=False)
    replayed = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_selective_checkpoint_sees_the_op(impl: str, device: torch.device) -> None:
    x = torch.randn(6, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device)
    seen = []

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        seen.append(op)
        ours = op is torch.ops.gptkernels.layer_norm_fwd.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        lambda t: layer_norm(t * 2, weight, impl=impl) * 3,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    )
    y.sum().backward()
    assert torch.ops.gptkernels.layer_norm_fwd.default in seen


def test_autocast_leaves_dtypes_alone(device: torch.device, seed: int) -> None:
    """The residual stream stays fp32 beside 16-bit branches: nothing is cast behind the caller's
    back."""
    weight = torch.randn(32, device=device)
    branch = torch.randn(4, 32, device=device).bfloat16()
    stream = torch.randn(4, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, s = layer_norm(branch, weight, residual=stream, prenorm=True)
        narrow = layer_norm(branch, weight.bfloat16())
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow, layer_norm(branch, weight.bfloat16()))
    assert_layer_norm("torch", dict(x=branch, weight=weight, residual=stream), seed)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = layer_norm(x, torch.ones(8, device=device))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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
        (_bad(impl="cudnn"), ValueError, "impl must be 'auto', 'cuda', 'triton' or 'torch'"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        layer_norm(**arguments)
