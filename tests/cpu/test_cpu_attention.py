"""Attention by the CPU kernels, on every instruction set. A group has 32 queries, a block 128 or
256 keys, an item 512 lanes forward; backward 128 or 256 queries meet a block at a time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import BF16, DTYPES, FP32, by_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import attention_inputs, int32
from right import assert_right, assert_same, run, seeded

from gptkernels import attention, attention_varlen
from gptkernels.ops.attention.cpu import dense
from gptkernels.ops.attention.options import AttentionOptions

pytestmark = pytest.mark.usefixtures("isa")


@by_dtype
@settings(max_examples=6)
@given(
    sizes=st.tuples(
        st.integers(1, 2),  # B
        st.integers(1, 100),  # Tq
        st.integers(1, 100),  # Tk
        st.sampled_from([1, 2, 3]),  # query heads for each key head
        st.integers(1, 2),  # Hk
        st.integers(1, 70),  # D
    ),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 90), st.integers(-1, 90)),
    softcap=st.sampled_from([0.0, 0.0, 3.0]),
    alibi=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_any_size_and_option(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float,
    alibi: bool,
    dropout_p: float,
    seed: int,
) -> None:
    B, Tq, Tk, group, Hk, D = sizes
    tensors = attention_inputs(B, Tq, Tk, group * Hk, Hk, D, dtype, seed)
    options: dict[str, Any] = dict(causal=causal, window=window, softcap=softcap)
    if alibi:
        options["alibi_slopes"] = [0.3 / (h + 1) for h in range(group * Hk)]
    # PyTorch's error on few numbers is random.
    assert_right(
        attention, tensors, seed, impl="cpu", gradients=min(B * Tq * Hk, B * Tk * Hk) * D >= 256,
        dropout_p=dropout_p, return_lse=True, **options,
    )  # fmt: skip


@by_dtype
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 300, 300, 1, 1, 64), dict()),
        ((1, 257, 257, 2, 1, 33), dict(causal=False)),
        ((1, 300, 420, 1, 1, 24), dict(window=(130, 0))),
        ((1, 300, 300, 1, 1, 17), dict(window=(40, 70), causal=False, softcap=4.0)),
        ((2, 130, 300, 2, 2, 16), dict(key_lengths=(0, 259))),
        ((1, 290, 290, 3, 3, 40), dict(dropout_p=0.3)),
        ((1, 40, 40, 24, 1, 8), dict()),  # more lanes than an item has
        ((1, 70, 70, 1, 1, 256), dict()),
        ((1, 140, 140, 1, 1, 130), dict(softmax_scale=-0.1)),
        ((1, 40, 2100, 1, 1, 16), dict()),  # more keys than are made ready together
    ],
    ids=str,
)
def test_across_blocks(
    dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any], seed: int
) -> None:
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = int32(*options["key_lengths"])
    tensors = attention_inputs(*sizes, dtype=dtype, seed=seed)
    # Backward there is no such limit, and few queries are few numbers.
    gradients = sizes[2] < 1000
    assert_right(
        attention, tensors, seed, impl="cpu", gradients=gradients, return_lse=True, **options
    )


@by_dtype
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_reaches_only_those_who_see_it(
    dtype: torch.dtype, where: str, value: float
) -> None:
    """Causal with a window of 12: row 130 and key 130 concern the rows and keys 118 ... 142."""
    T, at, reach = 300, 130, 12
    tensors = attention_inputs(1, T, dtype=dtype)
    cotangents = [torch.randn(1, T, 2, 16).to(dtype), torch.randn(1, 2, T)]
    call = functools.partial(attention, window=(reach, 0), return_lse=True, impl="cpu")
    wanted = run(call, tensors, cotangents)
    rows = {**tensors, "dout": cotangents[0]}[where]
    rows[:, at, 1, 3] = value
    out, lse, *gradients = run(call, tensors, cotangents)
    far = torch.ones(T, dtype=torch.bool)
    far[at - reach : at + reach + 1] = False
    clean_run = (wanted[0], wanted[1].mT, *wanted[2:])
    for found, clean in zip((out, lse.mT, *gradients), clean_run, strict=True):
        assert torch.equal(found[:, far], clean[:, far])
        assert torch.equal(found[:, :, 0], clean[:, :, 0])
    seen = torch.stack([x[:, ~far, 1].isfinite().all() for x in (out, *gradients)])
    assert not seen.all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_head_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """Alone, it is cut into smaller items."""
    tensors = attention_inputs(3, 300, 300, 4, 2, 40, dtype)
    call = functools.partial(attention, window=(200, 0), return_lse=True, impl="cpu")
    cotangents = [torch.randn(3, 300, 4, 40).to(dtype), torch.randn(3, 4, 300)]
    whole = run(call, tensors, cotangents)
    b = slice(1, 2)
    alone = {
        "q": tensors["q"][b, :, 2:], "k": tensors["k"][b, :, 1:], "v": tensors["v"][b, :, 1:]
    }  # fmt: skip
    found = run(call, alone, [cotangents[0][b, :, 2:], cotangents[1][b, 2:]])
    out, lse, dq, dk, dv = whole
    wanted = [out[b, :, 2:], lse[b, 2:], dq[b, :, 2:], dk[b, :, 1:], dv[b, :, 1:]]
    assert_same(found, wanted)


@by_dtype
@pytest.mark.parametrize(
    ("wanted", "sizes", "options"),
    [
        ("qkv", (1, 600, 600, 1, 1, 20), dict(alibi_slopes=[0.3])),
        ("qkv", (1, 300, 900, 3, 1, 33), dict(window=(300, 0), softcap=3.0, dropout_p=0.2)),
        ("q", (1, 600, 530, 2, 2, 16), dict(causal=False, key_lengths=[300])),
        ("kv", (1, 600, 530, 2, 2, 16), dict(causal=False, key_lengths=[300])),
        ("v", (1, 700, 530, 1, 1, 16), dict(causal=False, window=(30, 260))),
        # Query 288 is the last that sees key 255: a part of the keys meets its whole group too.
        ("kv", (1, 600, 600, 1, 1, 16), dict(causal=False, window=(33, 10), dropout_p=0.2)),
    ],
    ids=str,
)
def test_parts_of_a_head_have_the_bits_of_the_whole(
    dtype: torch.dtype, wanted: str, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    """One thread takes a whole head, seven take parts of it. Some queries see no key, some keys
    belong to no query, and a number is not finite."""
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = int32(*options["key_lengths"])
    tensors = attention_inputs(*sizes, dtype=dtype)
    tensors["k"][0, 290, 0, 3] = torch.inf
    call = functools.partial(attention, return_lse=True, impl="cpu", **options)
    B, T, _, H, _, D = sizes
    cotangents = [torch.randn(B, T, H, D).to(dtype), torch.randn(B, H, T)]
    found = []
    for count in (1, 7):
        with threads(count):
            outputs = run(seeded(call), tensors, cotangents, wanted)
        found.append([x.nan_to_num(123.0) for x in outputs])
    assert_same(*found)


@by_dtype
def test_a_packed_sequence_has_the_bits_of_its_own_batch(dtype: torch.dtype) -> None:
    lengths = [37, 0, 260, 5]
    ends = int32(0, 37, 37, 297, 302)
    tensors = {k: v[0] for k, v in attention_inputs(1, 302, 302, 4, 2, 24, dtype).items()}
    packed = functools.partial(
        attention_varlen, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=260, max_seqlen_k=260,
        softcap=5.0, impl="cpu",
    )  # fmt: skip
    cotangent = torch.randn(302, 4, 24).to(dtype)
    found = run(packed, tensors, [cotangent])
    first = 0
    for length in lengths:
        rows = slice(first, first := first + length)
        one = {name: tensor[rows][None] for name, tensor in tensors.items()}
        alone = run(
            functools.partial(attention, softcap=5.0, impl="cpu"), one, [cotangent[rows][None]]
        )
        assert_same([x[rows] for x in found], [x[0] for x in alone])


@by_dtype
@pytest.mark.parametrize("count", [1, 3, 16])
def test_dropout_follows_the_contract(dtype: torch.dtype, count: int) -> None:
    """With v a unit matrix, out holds the weights themselves."""
    T = 96
    q, k = torch.zeros(2, T, 3, T, dtype=dtype), torch.zeros(2, T, 3, T, dtype=dtype)
    v = torch.eye(T, dtype=dtype)[None, :, None].expand(2, T, 3, T)
    with threads(count):
        call = functools.partial(attention, q, k, v, causal=False, dropout_p=0.4)
        found, wanted = (seeded(call)(impl=impl) for impl in ("cpu", "torch"))
    assert torch.equal(found == 0, wanted == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_tensor_three_times(dtype: torch.dtype, seed: int) -> None:
    x = attention_inputs(1, 50, dtype=dtype, seed=seed)["q"]
    found = run(lambda x: attention(x, x, x, impl="cpu"), dict(x=x))
    copies = dict(q=x, k=x.clone(), v=x.clone())
    out, dq, dk, dv = run(functools.partial(attention, impl="cpu"), copies)
    assert_same(found, [out, dq + dk + dv])


def test_unmeasured_lengths_are_clamped() -> None:
    """torch.compile has no values to check."""
    tensors = attention_inputs(2, 20)
    options = AttentionOptions(0.25, right=0)
    lengths = [int32(-7, 99), int32(0, 20)]
    found, wanted = (
        dense.attention_fwd(**tensors, options=options._replace(key_lengths=ends))
        for ends in lengths
    )
    assert_same(found, wanted)
