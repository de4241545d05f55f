"""What heads learn, sinks and ALiBi slopes, and heads of other widths, in every implementation."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from attention_cases import hold
from harness import DEVICE, FP32, by_dtype, each, each_kernel, each_kernel_with_cpu, runnable
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import attention_inputs, cache, draw, int32, varlen_inputs, varlen_lengths
from right import assert_right, assert_same, run
from torch import Tensor

from gptkernels import attention, attention_decode, attention_varlen
from gptkernels.core import plans
from gptkernels.core.plans import Plan
from gptkernels.ops.attention import decode, dense
from gptkernels.ops.attention.options import AttentionOptions

# The error of few numbers is luck, PyTorch's too: so there are many heads, of few tokens.
H, HK = 32, 16


def inputs(
    B: int, Tq: int, Tk: int, D: int = 16, Dv: int = 16, dtype: torch.dtype = FP32
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = attention_inputs(B, Tq, Tk, H, HK, D, dtype, seed=None)
    return found | {"v": draw(B, Tk, HK, Dv, dtype=dtype), "sinks": draw(H, dtype=dtype)}


def few_heads(Tk: int) -> dict[str, Tensor]:
    """Of 20 queries, for what has to have the same bits."""
    found: dict[str, Tensor] = attention_inputs(1, 20, Tk, 4, 2, seed=None)
    return found | {"sinks": draw(4)}


def slopes(*shape: int) -> Tensor:
    return draw(*shape, H).abs() * 0.3


@runnable
def test_sinks(impl: str, dtype: torch.dtype, seed: int) -> None:
    """The first six queries see no key."""
    options = {"window": (9, 2), "softcap": 3.0, "dropout_p": 0.2, "return_lse": True}
    hold(inputs(1, 40, 34, dtype=dtype), impl, seed, **options)


@by_dtype
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_sinks_alone(impl: str, dtype: torch.dtype, seed: int) -> None:
    """With them alone impl="torch" calls PyTorch's fused op in 16 bits."""
    hold(inputs(1, 20, 20, dtype=dtype), impl, seed)


@runnable
def test_slopes_and_sinks_of_packed_sequences(impl: str, dtype: torch.dtype, seed: int) -> None:
    queries, keys = [5, 0, 17, 3], [9, 4, 17, 0]
    tensors = varlen_inputs(queries, keys, H, HK, dtype=dtype)
    tensors |= {"sinks": draw(H, dtype=dtype), "alibi_slopes": slopes(4)}
    rest = varlen_lengths(queries, keys)
    hold(tensors, impl, seed, op=attention_varlen, **rest, return_lse=True)


@runnable
def test_learned_slopes(impl: str, dtype: torch.dtype, seed: int) -> None:
    tensors = inputs(1, 21, 25, dtype=dtype) | {"alibi_slopes": slopes()}
    del tensors["sinks"]
    hold(tensors, impl, seed, causal=False, window=(-1, 5), softcap=4.0)


@runnable
@pytest.mark.parametrize(("D", "Dv"), [(16, 33), (40, 8)])
def test_values_of_another_width(impl: str, dtype: torch.dtype, D: int, Dv: int, seed: int) -> None:
    tensors = attention_inputs(1, 20, 23, 4, 2, D, dtype, seed)
    tensors["v"] = draw(1, 23, 2, Dv, dtype=dtype)
    hold(tensors, impl, seed, return_lse=True)


@by_dtype
@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize(("D", "Dv"), [(257, 257), (512, 40), (40, 512)])
def test_wide_heads(impl: str, D: int, Dv: int, dtype: torch.dtype, seed: int) -> None:
    tensors = attention_inputs(1, 17, 19, 4, 2, D, dtype, seed)
    tensors["v"] = draw(1, 19, 2, Dv, dtype=dtype)
    hold(tensors, impl, seed, return_lse=True)


@runnable
@pytest.mark.parametrize("causal", [True, False])
def test_decoding(impl: str, dtype: torch.dtype, causal: bool, seed: int) -> None:
    tensors, rest = cache([70, 3, 0, 300], 4, 16, 4, 16, dtype=dtype)
    # Some sinks are above all scores.
    tensors |= {"sinks": 3 * draw(16, dtype=dtype), "alibi_slopes": draw(4, 16).abs() * 0.1}
    options = {"window": (40, 2), "num_splits": 3, "return_lse": True, **rest}
    for x in tensors.values():
        x.nan_to_num_()  # the truth multiplies what lies past a length by 0
    assert_right(
        attention_decode, tensors, seed, gradients=False, causal=causal, impl=impl, **options
    )


@by_dtype
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_decoding_values_of_another_width(impl: str, dtype: torch.dtype, seed: int) -> None:
    tensors, rest = cache([70, 3, 300], 2, 16, 4, 16, dtype=dtype)
    tensors["v_cache"] = draw(*tensors["v_cache"].shape[:3], 40, dtype=dtype)
    tensors["k_cache"].nan_to_num_()
    assert_right(attention_decode, tensors, seed, gradients=False, impl=impl, **rest)


@each
@settings(max_examples=3)
@given(
    Tq=st.integers(1, 40),
    Tk=st.integers(1, 40),
    widths=st.sampled_from([(16, 16), (8, 20), (33, 16)]),
    causal=st.booleans(),
    left=st.sampled_from([-1, 0, 7]),
    entries=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
def test_any_of_them_together(
    impl: str, Tq: int, Tk: int, widths: tuple[int, int], causal: bool, left: int,
    entries: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    tensors = inputs(entries, Tq, Tk, *widths)
    tensors["alibi_slopes"] = slopes() if entries == 1 else slopes(entries)
    # With a single key for each query dq, dk and the slopes' gradient are rounding noise.
    hold(tensors, impl, seed, gradients=Tk > 8 and left != 0, causal=causal, window=(left, -1))


@each
@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_of_another_width(impl: str, sizes: tuple[int, int, int]) -> None:
    tensors = inputs(*sizes, D=16, Dv=24)
    out, *gradients = run(functools.partial(attention, impl=impl), tensors, wanted="qkv")
    assert out.shape == (*sizes[:2], H, 24)
    assert not out.any()
    for gradient, name in zip(gradients, "qkv", strict=True):
        assert gradient.shape == tensors[name].shape


@each_kernel_with_cpu
def test_a_sink_of_no_weight_changes_no_bit(impl: str) -> None:
    """Also in a row that sees no key."""
    tensors = few_heads(17)
    none = tensors.pop("sinks").fill_(-math.inf)
    alibi = {"alibi_slopes": [0.5, 0.2, 0.1, 0.0]}
    for options in ({"causal": True}, {"window": (4, 1), "softcap": 2.0, **alibi}):
        found, wanted = (
            run(lambda **x: attention(**x, **options, **more, return_lse=True, impl=impl), tensors)  # noqa: B023
            for more in ({"sinks": none}, {})
        )
        assert_same(found, wanted)


@each
def test_a_sink_of_all_weight(impl: str) -> None:
    """out is 0, also where the sink is much larger than all scores."""
    tensors = few_heads(17)
    tensors["sinks"].fill_(1e30)
    out, lse, *gradients = run(
        lambda **x: attention(**x, return_lse=True, impl=impl),
        tensors,
        [torch.ones(1, 20, 4, 16, device=DEVICE), torch.zeros(1, 4, 20, device=DEVICE)],
    )
    assert not out.any()
    assert (lse == tensors["sinks"][:, None]).all()
    assert not any(x.any() for x in gradients)


@each
@pytest.mark.parametrize("where", ["q", "out", "lse"])
def test_nan_reaches_nobody_who_does_not_see_it(impl: str, where: str) -> None:
    """The first three queries see no key; their sinks make their lse finite."""
    tensors = few_heads(17)
    cotangents = [draw(1, 20, 4, 16), draw(1, 4, 20)]

    def gradients() -> list[Tensor]:
        return run(
            lambda **x: attention(**x, return_lse=True, impl=impl), tensors, cotangents, "qkv"
        )

    wanted = gradients()
    rows = dict(q=tensors["q"], out=cotangents[0], lse=cotangents[1].mT)[where]
    rows[:, :3] = torch.nan
    found = gradients()
    assert not found[0][:, :3].any()  # out
    assert not found[2][:, :3].any()  # dq
    assert_same(found, wanted)


@each
def test_scores_of_minus_infinity_reach_nobody_else(impl: str) -> None:
    """All scores of query 12 are -inf. As its sink makes its lse finite, it looks like any other
    query; it sees the keys 8 ... 12."""
    tensors = few_heads(20)
    tensors["k"][..., 3] = -1
    cotangent = [draw(1, 20, 4, 16)]

    def results() -> list[Tensor]:
        return run(lambda **x: attention(**x, window=(4, 0), impl=impl), tensors, cotangent, "qkv")

    wanted = results()
    tensors["q"][:, 12, :, 3] = torch.inf
    found = results()
    assert not found[0][:, 12].any()
    others = [*range(12), *range(13, 20)], [*range(8), *range(13, 20)]
    for a, b, apart in zip(found, wanted, (others[0],) * 2 + (others[1],) * 2, strict=True):
        assert torch.equal(a[:, apart], b[:, apart])


@each_kernel
def test_a_launcher_refuses_what_its_kernels_lack(impl: str) -> None:
    """Also where no public function has looked at the call."""
    options = AttentionOptions(0.1, key_lengths=int32(8))
    wide, narrow = draw(1, 8, 2, 257), draw(1, 8, 2, 16)
    with pytest.raises(NotImplementedError, match="a head width of more than 256: only"):
        dense.attention_fwd(wide, wide, wide, *options, impl)
    with pytest.raises(NotImplementedError, match="v of another width than q: only"):
        decode.attention_decode_fwd(
            narrow, narrow, narrow[..., :8].contiguous(), None, 0, *options, impl
        )


def test_a_plan_for_other_calls_is_not_taken_where_it_lacks_an_option() -> None:
    q = torch.randn(1, 8, 4, 16)
    masked = {"attn_mask": torch.randn(8, 8), "causal": False}
    wanted = attention(q, q, q, **masked, impl="torch")
    with plans.only({"attention": Plan("triton", "triton")}):
        torch.testing.assert_close(attention(q, q, q, **masked), wanted)
