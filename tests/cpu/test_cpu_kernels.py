"""LayerNorm, GELU and dropout's masks by the CPU kernels, on every instruction set."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, DTYPES, FP16, FP32, by_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import cache, gelu_mlp_inputs, layer_norm_inputs
from right import assert_gradients_alone, assert_right, assert_same, run, seeded

from gptkernels import attention_decode, gelu_mlp, layer_norm
from gptkernels.core import cpu, masks, philox
from gptkernels.ops.gelu_mlp.cpu import gelu_backward
from gptkernels.ops.layer_norm.op import layer_norm_fwd

pytestmark = pytest.mark.usefixtures("isa")


@by_dtype
@given(
    rows=st.integers(0, 40),
    cols=st.integers(1, 70),
    residual=st.sampled_from([None, *DTYPES]),
    weights=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.3, 1.0]),
    wide=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_layer_norm(
    dtype: torch.dtype,
    rows: int,
    cols: int,
    residual: torch.dtype | None,
    weights: torch.dtype,
    dropout_p: float,
    wide: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = layer_norm_inputs(rows, cols, dtype=dtype, weight=weights, residual=residual)
    options: dict[str, Any] = dict(dropout_p=dropout_p, residual_in_fp32=wide, prenorm=True)
    # PyTorch's error on few numbers is random.
    assert_right(
        layer_norm, tensors, seed, impl="cpu", gradients=rows >= 8 and cols >= 8, **options
    )


@by_dtype
@pytest.mark.parametrize("residual", DTYPES)
def test_layer_norm_of_rows_in_several_blocks(
    dtype: torch.dtype, residual: torch.dtype, seed: int
) -> None:
    tensors = layer_norm_inputs(12, 1100, dtype=dtype, residual=residual)
    assert_right(layer_norm, tensors, seed, impl="cpu", dropout_p=0.1, prenorm=True)


@by_dtype
@pytest.mark.parametrize("residual", [None, *DTYPES])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_s_that_is_not_kept_changes_no_bits(
    dtype: torch.dtype, residual: torch.dtype | None, dropout_p: float, seed: int
) -> None:
    """It lies in y where it can."""
    tensors = layer_norm_inputs(9, 70, dtype=dtype, residual=residual)
    call = seeded(functools.partial(layer_norm, **tensors, dropout_p=dropout_p, impl="cpu"), seed)
    assert_same([call()], [call(prenorm=True)[0]])


@pytest.mark.parametrize("C", [7, 96, 12288])
def test_a_mean_is_rounded_once(C: int) -> None:
    """Row by row: the worst of many rows would hide it."""
    x = torch.randn(256, C) + 100
    mean = layer_norm_fwd(x, torch.ones(C), None, None, None, 0.0, 1e-5, None, "cpu")[2]
    off = (mean - x.double().mean(1)).abs().max().item()
    # Half the distance of two neighbours of 100, and a quarter of that for the sums.
    assert off < 1.25 * 2**-18


@pytest.mark.parametrize("mean", [1e4, 1e19, 3e37])
def test_rows_of_one_large_value(mean: float) -> None:
    for C in (1, 5, 64, 150):
        bias = torch.randn(C)
        assert_same([layer_norm(torch.full((5, C), mean), None, bias, impl="cpu")[3]], [bias])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_loses_no_digits_of_its_slope(approximate: str) -> None:
    """Its largest error is below PyTorch's own. 1 - s in place of exp(-u) s would make it twice
    that."""
    h = torch.linspace(-12, 12, 100_001)[None]
    exact = h.double().requires_grad_()
    F.gelu(exact, approximate=approximate).sum().backward()
    one, found = torch.ones_like(h), torch.empty_like(h)
    gelu_backward(h, one, found, None, None, approximate)
    theirs = torch.ops.aten.gelu_backward(one, h, approximate=approximate)
    errors = [(x - exact.grad).abs().max().item() for x in (found, theirs)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_mlp(dtype: torch.dtype, approximate: str, seed: int) -> None:
    for rows, cols, inner in ((70, 33, 130), (3, 40, 17), (129, 8, 64)):
        tensors = gelu_mlp_inputs(rows, cols, inner, dtype=dtype, seed=seed)
        assert_right(gelu_mlp, tensors, seed, impl="cpu", approximate=approximate)


@by_dtype
@settings(max_examples=6)  # for each dtype and instruction set
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    Tq=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (40, 1)]),
    D=st.integers(1, 70),
    page=st.sampled_from([None, 1, 5, 16]),
    window=st.sampled_from([None, (6, 0), (100, 0)]),
    softcap=st.sampled_from([0.0, 2.0]),
    slopes=st.booleans(),
    num_splits=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**20),
)
def test_attention_decode(
    dtype: torch.dtype,
    lengths: list[int],
    Tq: int,
    heads: tuple[int, int],
    D: int,
    page: int | None,
    slopes: bool,
    seed: int,
    **options: Any,
) -> None:
    torch.manual_seed(seed)
    # PyTorch's error on few numbers is random, and lse has one for each query head and token.
    lengths = [*lengths, 90]
    lengths *= max(1, 48 // (len(lengths) * Tq * heads[0]))
    tensors, rest = cache(lengths, Tq, *heads, max(D, 64 // heads[0]), page, dtype)
    options["alibi_slopes"] = [0.3 / (i + 1) for i in range(heads[0])] if slopes else None
    assert_right(
        attention_decode, tensors, gradients=False, impl="cpu", return_lse=True, **rest, **options
    )


@pytest.mark.parametrize("D", [16, 20, 33, 100])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_decoding_keeps_what_is_not_finite_to_those_who_see_it(D: int, value: float) -> None:
    """Each of five tokens sees one key more than the one before; two heads share a key head. A row
    that sees an infinite value has it in that column alone."""
    tensors, rest = cache([150], 5, 4, 2, D)
    how = dict(window=(40, 0), num_splits=2, impl="cpu")
    expected = attention_decode(**tensors, **rest, **how)
    tensors["v_cache"][0, 147, 1, D - 1] = value  # tokens 2, 3 and 4 see it
    expected[0, 2:, 2:, D - 1] = value
    tensors["v_cache"][0, 106, 0, 0] = value  # tokens 0 and 1
    expected[0, :2, :2, 0] = value
    found = attention_decode(**tensors, **rest, **how)
    assert_same([found.nan_to_num(7e7, 8e8, 9e9)], [expected.nan_to_num(7e7, 8e8, 9e9)])


@pytest.mark.parametrize("D", [16, 20, 33, 100])
def test_a_key_that_is_minus_infinity_has_no_weight(D: int) -> None:
    """The last vector of a row must not count a column twice, nor multiply it by 0."""
    tensors, rest = cache([70], 1, 2, 1, D)
    tensors["q"].abs_()
    how = dict(impl="cpu", return_lse=True)
    for column in (D - 1, max(0, D - 5), max(0, D - 12), 0):
        masked = {name: x.clone() for name, x in tensors.items()}
        masked["k_cache"][0, 33, 0, column] = -torch.inf
        hidden = {name: x.clone() for name, x in tensors.items()}
        hidden["k_cache"][0, 33] = -1e4
        found = attention_decode(**masked, **rest, **how)
        assert_same(found, attention_decode(**hidden, **rest, **how))


@pytest.mark.parametrize("heads", [(5, 5), (6, 2), (40, 20)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_heads_that_go_together_are_each_alone(heads: tuple[int, int], count: int) -> None:
    """Heads whose memory is apart go one by one. Those side by side go together, fewer of them
    where there are more threads; here values lie further apart than keys."""
    tensors, rest = cache([600, 3, 290], 2, *heads, 20)
    how = dict(impl="cpu", return_lse=True, window=(500, 0))
    with threads(count):
        apart = {
            name: x if name == "q" else x.transpose(1, 2).contiguous().transpose(1, 2)
            for name, x in tensors.items()
        }
        expected = attention_decode(**apart, **rest, **how)
        tensors["v_cache"] = F.pad(tensors["v_cache"], (0, 9), value=torch.nan)[..., :20]
        assert_same(attention_decode(**tensors, **rest, **how), expected)
    assert_right(attention_decode, tensors, gradients=False, **how, **rest)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("D", [1, 7, 20, 63])
def test_decoding_reads_the_columns_of_its_own_heads_alone(name: str, D: int) -> None:
    """What lies between rows is NaN."""
    tensors, rest = cache([70, 20], 2, 4, 2, D)
    how = dict(impl="cpu", return_lse=True)
    expected = attention_decode(**tensors, **rest, **how)
    x = tensors[name]
    apart = x.new_full((*x.shape[:-1], D + 40), torch.nan)[..., 20 : 20 + D]
    found = attention_decode(**{**tensors, name: apart.copy_(x)}, **rest, **how)
    assert_same(found, expected)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_of_every_fp16_number(approximate: str) -> None:
    """And its derivative, beside fp64: half a unit in the last place, and what fp32 loses."""
    h = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(FP16)
    h = h[h.abs() < 60000]
    a, dh = torch.empty_like(h), torch.empty_like(h)
    kernels, tanh = cpu.module(), approximate == "tanh"
    one = torch.ones_like(h)
    kernels.gelu_fwd(h.data_ptr(), a.data_ptr(), len(h), tanh, cpu.DTYPE_CODES[FP16], 1)
    kernels.gelu_bwd(
        h.data_ptr(), one.data_ptr(), dh.data_ptr(), 0, 0, 1, len(h), tanh, cpu.DTYPE_CODES[FP16], 1
    )
    exact = h.double().requires_grad_()
    truth = torch.nn.functional.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    for found, wanted in ((a, truth.detach()), (dh, slope)):
        error = (found.double() - wanted).abs()
        assert (error <= 2**-11 * wanted.abs() * 1.001 + 2**-24).all()


def test_conversions_are_those_of_pytorch() -> None:
    """By way of a residual stream: s = x + 0 in fp32 widens x, s = x + r in 16 bits rounds."""
    weight = torch.ones(64)
    for dtype in (BF16, FP16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
        _, s = layer_norm(every, weight, residual_in_fp32=True, prenorm=True, impl="cpu")
        normal = every.float().abs() >= torch.finfo(FP32).tiny  # the others may count as 0
        assert_same([s[normal]], [every.float()[normal]])
        torch.manual_seed(3)
        a, b = (torch.randn(500, 64, dtype=dtype) * 10 ** torch.randn(500, 1) for _ in "ab")
        a, b = a.to(dtype), b.to(dtype)
        _, s = layer_norm(a, weight, residual=b, prenorm=True, impl="cpu")
        assert_same([s], [a + b])


@pytest.mark.parametrize("C", [1, 5, 64, 479, 480, 481, 1000])
def test_masks_are_the_contracts(C: int) -> None:
    rng, shape = torch.tensor([2**62 + 12345, 2**40 + 7]), torch.Size((7, C))
    found = [masks.elementwise_keep(rng, 0.3, shape)]
    assert_same(found, [philox.elementwise_keep(rng, 0.3, shape)])
    for first in ((0, 0), (21, 5)):
        sizes = (2, 3, 19, C, *first)
        found = [masks.attention_keep(rng, 0.3, *sizes)]
        assert_same(found, [philox.attention_keep(rng, 0.3, *sizes)])


@by_dtype
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    tensors = layer_norm_inputs(37, 100, dtype=dtype, residual=dtype)
    call = functools.partial(layer_norm, impl="cpu")
    cotangent = torch.randn(37, 100).to(dtype)
    whole = run(call, tensors, [cotangent], ["x"])
    for row in (0, 17, 36):
        one = {k: v if v.dim() == 1 else v[row : row + 1] for k, v in tensors.items()}
        alone = run(call, one, [cotangent[row : row + 1]], ["x"])
        assert_same(alone, [x[row : row + 1] for x in whole])


@by_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_row(dtype: torch.dtype, value: float) -> None:
    tensors = layer_norm_inputs(9, 50, dtype=dtype, residual=dtype)
    call = functools.partial(layer_norm, impl="cpu", prenorm=True)
    clean = run(call, tensors, [torch.ones(9, 50, dtype=dtype)] * 2, ["x", "residual"])
    tensors["x"][4, 49] = value
    found = run(call, tensors, [torch.ones(9, 50, dtype=dtype)] * 2, ["x", "residual"])
    others = torch.arange(9) != 4
    assert_same([x[others] for x in found], [x[others] for x in clean])
    assert not found[0][4].isfinite().any()


def test_only_the_gradients_asked_for() -> None:
    tensors = layer_norm_inputs(5, 40, residual=FP32)
    assert_gradients_alone(functools.partial(layer_norm, impl="cpu"), tensors)


def test_the_same_bits_again() -> None:
    tensors = layer_norm_inputs(70, 90, dtype=BF16, residual=FP32)
    call = seeded(functools.partial(layer_norm, dropout_p=0.2, impl="cpu"))
    assert_same(run(call, tensors), run(call, tensors))
