"""layer_norm's CUDA C++ kernels for any GPU, with all widths, alignments and dtypes that take
different paths. test_layer_norm_sm90.py tests the kernels for Hopper."""

from __future__ import annotations

import functools

import pytest
import torch
from harness import BF16, DTYPES, FP16, FP32, emulated, name_of, needs_cuda
from op_inputs import layer_norm_inputs
from right import assert_right, assert_same, run

from gptkernels import layer_norm
from gptkernels.core import native

pytestmark = needs_cuda
hold = functools.partial(assert_right, layer_norm, impl="cuda")

# Widths around these limits: a group of 8 columns; the 256 columns of a warp; rows that several
# warps share (above 1,792 forward, 1,024 backward); rows that do not fit in registers (above 8,192
# backward).
NARROW = (1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 511, 768, 1023, 1024, 1025, 1280, 1600)
WIDE = (1792, 1800, 2049, 3000, 4096, 8191, 8192, 8200)


@pytest.mark.parametrize("C", NARROW + WIDE)
def test_widths(C: int, seed: int) -> None:
    dtypes = DTYPES if C in (768, 1024, 1600) else DTYPES[seed % 3 :][:1]
    M = 33 if C < 64 else 5  # the largest error of a handful of values is random
    for dtype in dtypes:
        inputs = layer_norm_inputs(M, C, dtype=dtype, residual=dtype)
        hold(inputs | dict(residual=None), seed)
        hold(inputs, seed, prenorm=True, dropout_p=0.25)


@pytest.mark.parametrize(
    ("C", "dtype"),
    [
        (28_672, FP32), (28_680, FP32), (32_768, BF16),
        (32_776, FP16), (65_536, FP32), (65_536, BF16),
        (65_537, FP16),
    ],
)  # fmt: skip
def test_widest_rows(C: int, dtype: torch.dtype, seed: int) -> None:
    """Forward: the widest rows that stay in registers (28,672 columns of an fp32 s, 32,768 of a
    16-bit s), and wider rows, which are read three times."""
    inputs = layer_norm_inputs(2, C, dtype=dtype, residual=dtype)
    hold(inputs, seed, prenorm=True, dropout_p=0.1)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=name_of)
def test_mixtures_of_dtypes(x_dtype: torch.dtype, residual_dtype: torch.dtype, seed: int) -> None:
    for weight_dtype in DTYPES:
        for C in (48, 51):
            inputs = layer_norm_inputs(
                19, C, dtype=x_dtype, weight=weight_dtype, residual=residual_dtype
            )
            options = dict(prenorm=True, residual_in_fp32=(seed + C) % 2 == 0)
            hold(inputs, seed, dropout_p=0.3 * (seed % 2), **options)


@pytest.mark.parametrize("C", [64, 640, 2560, 8200])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_rows_that_are_not_aligned(
    C: int, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    """One operand is not aligned, by its address or by its stride. Then the kernels read nothing 16
    bytes at a time."""
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
        hold(dict(x=x, weight=weight), seed)
        inputs = dict(x=x, weight=weight, bias=weight, residual=x)
        hold(inputs, seed, prenorm=True, dropout_p=0.1)
        hold(inputs | dict(residual=residual), seed)


@pytest.mark.parametrize(
    ("M", "C"),
    [
        (403, 40), (403, 39),  # four rows in a CTA; backward ten CTAs take turns
        (50, 776), (9, 1032), (30, 1025),  # one warp for a row; two warps for a row; not aligned
        (11, 2304), (13, 3000),  # three warps for a row
    ],
)  # fmt: skip
def test_more_rows_than_ctas(M: int, C: int, seed: int) -> None:
    hold(layer_norm_inputs(M, C), seed)
    inputs = layer_norm_inputs(M, C, dtype=BF16, residual=FP32)
    hold(inputs, seed, prenorm=True, dropout_p=0.2)


@pytest.mark.parametrize("C", [40, 8200])
@pytest.mark.parametrize("partials", [1, 2, 32, 33, 70])
def test_any_number_of_partial_sums(
    partials: int, C: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage adds 32 partial sums at a time. The sums of a CTA without rows are 0."""
    count = "layer_norm_bwd_partials"
    monkeypatch.setattr(native.module(), count, lambda *_sizes: partials)
    hold(layer_norm_inputs(37, C), seed)


@pytest.mark.parametrize("C", [40, 41, 8200])
def test_only_one_weight_gradient(C: int, device: torch.device, seed: int) -> None:
    """The op itself returns dweight only, or dbias only."""
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


@emulated
@pytest.mark.parametrize("C", [40, 1032, 2304, 8200])
def test_any_schedule_gives_the_same_bits(
    C: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, call = layer_norm_inputs(9, C), functools.partial(layer_norm, impl="cuda")
    wanted = run(call, inputs)
    for schedule in ("reverse", str(seed)):
        monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
        assert_same(run(call, inputs), wanted)


def test_constant_rows(device: torch.device) -> None:
    """Rows without variance give y = bias, whether or not the mean is rounded."""
    for C in (104, 101, 300, 779, 1784):
        bias = torch.randn(C, device=device)
        x = torch.cat((torch.randn(12), torch.tensor([0.0, 1.0, 1e4 / 3, 1e15])))[:, None]
        x = x.to(device).expand(16, C)
        y = layer_norm(x, torch.ones(C, device=device), bias, eps=1e-30, impl="cuda")
        assert torch.equal(y, bias.expand(16, C))


def test_sums_of_other_dtypes_are_refused(device: torch.device) -> None:
    """The public function never asks for these dtypes of s."""
    x, weight = torch.zeros(2, 8, device=device).half(), torch.ones(8, device=device)
    sentence = r"x \(2, 8\) fp16: the sum must have the dtype of x, or fp32"
    for residual, dtype in ((x.float(), x.dtype), (x, BF16)):
        options = (weight, None, residual, None, 0.0, 1e-5, dtype, "cuda")
        with pytest.raises(RuntimeError, match=f"layer_norm_fwd on {sentence}"):
            torch.ops.gptkernels.layer_norm_fwd(x, *options)
    statistics = torch.ones(2, device=device)
    options = (statistics, statistics, weight, None, 0.0, x.dtype, None, True, True, "cuda")
    with pytest.raises(RuntimeError, match=f"layer_norm_bwd on {sentence}"):
        torch.ops.gptkernels.layer_norm_bwd(x, None, x.bfloat16(), *options)


def test_too_many_columns(device: torch.device) -> None:
    x = torch.zeros(1, device=device).expand(1, 2**30 + 8)
    with pytest.raises(NotImplementedError, match=r"up to 2\*\*30 columns, got 1073741832"):
        layer_norm(x, x[0], impl="cuda")
