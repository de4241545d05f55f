"""Sinks, slopes and their gradients, values of another width and wide heads in attention's CPU
kernels, on every instruction set. Vectors have 4 to 16 numbers and tiles 32; a group has 32
queries, a block 128 or 256 keys, of which up to 8 are made ready together, 4 of the widest."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from harness import by_dtype, threads
from op_inputs import attention_inputs, cache, draw, int32, varlen_inputs, varlen_lengths
from right import assert_right, assert_same, run, seeded
from torch import Tensor

from gptkernels import attention, attention_decode, attention_varlen
from gptkernels.truth.parity import poisoned_outputs

pytestmark = pytest.mark.usefixtures("isa")


def inputs(
    sizes: tuple[int, ...], dtype: torch.dtype, *, sinks: bool = True, slopes: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """q, k and v of sizes (B, Tq, Tk, H, Hk, D, Dv), and what a model may learn besides."""
    B, Tq, Tk, H, Hk, D, Dv = sizes
    made: dict[str, Tensor] = attention_inputs(B, Tq, Tk, H, Hk, D, dtype, seed=None)
    made["v"] = draw(B, Tk, Hk, Dv, dtype=dtype)
    if sinks:
        made["sinks"] = draw(H, dtype=dtype)
    if slopes:
        made["alibi_slopes"] = draw(*slopes).abs() * 0.2
    return made


# Of few heads the largest error of a gradient of slopes or sinks is luck, PyTorch's too.
@by_dtype
@pytest.mark.parametrize(
    ("sizes", "learned", "options"),
    [
        ((1, 33, 40, 48, 16, 16, 33), dict(), dict(causal=False)),
        # The first six queries see no key.
        ((1, 40, 34, 48, 48, 33, 1), dict(slopes=(48,)), dict(window=(9, 2), softcap=3.0)),
        ((2, 20, 150, 48, 48, 1, 16), dict(slopes=(2, 48)), dict(key_lengths=(150, 13))),
        ((1, 70, 60, 48, 24, 16, 8), dict(slopes=(1, 48), sinks=False), dict(dropout_p=0.2)),
    ],
    ids=str,
)
def test_sinks_and_slopes(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    learned: dict[str, Any],
    options: dict[str, Any],
    seed: int,
) -> None:
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = int32(*options["key_lengths"])
    tensors = inputs(sizes, dtype, **learned)
    assert_right(attention, tensors, seed, impl="cpu", return_lse=True, **options)


@by_dtype
@pytest.mark.parametrize(
    ("sizes", "gradients"),
    [
        ((1, 20, 20, 2, 1, 257, 512), True),
        ((1, 20, 20, 2, 1, 512, 256), True),
        ((1, 8, 600, 1, 1, 512, 512), False),  # more keys than are made ready together
    ],
)
def test_wide_heads(dtype: torch.dtype, sizes: tuple[int, ...], gradients: bool, seed: int) -> None:
    tensors = inputs(sizes, dtype, sinks=False)
    assert_right(attention, tensors, seed, impl="cpu", gradients=gradients, return_lse=True)


@by_dtype
def test_a_mask_that_learns_beside_sinks(dtype: torch.dtype, seed: int) -> None:
    """The mask hides every key from one query, whose lse is the sink."""
    tensors = inputs((1, 40, 40, 48, 48, 16, 16), dtype, slopes=(48,))
    tensors["attn_mask"] = draw(40, 40, dtype=dtype).fill_diagonal_(0)
    tensors["attn_mask"][7] = -torch.inf
    assert_right(attention, tensors, seed, impl="cpu", causal=False, return_lse=True)


@by_dtype
def test_parts_of_a_head_have_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    """One thread takes whole heads, seven take parts of them; and what is not asked for changes
    nothing."""
    tensors = inputs((1, 600, 300, 2, 1, 8, 24), dtype, slopes=(2,))
    call = seeded(functools.partial(attention, softcap=3.0, dropout_p=0.2, impl="cpu"))
    cotangents = [draw(1, 600, 2, 24).to(dtype)]
    found = []
    for wanted in (list(tensors), ["alibi_slopes"], ["k", "alibi_slopes"]):
        for count in (1, 7):
            with threads(count), poisoned_outputs():
                gradients = run(call, tensors, cotangents, wanted)[1:]
            found.append(dict(zip(wanted, gradients, strict=True)))
    for other in found[1:]:
        assert_same(list(other.values()), [found[0][name] for name in other])


@by_dtype
def test_a_packed_sequence_has_the_bits_of_its_own_batch(dtype: torch.dtype) -> None:
    queries, keys = [37, 0, 20, 5], [37, 4, 3, 0]
    tensors = varlen_inputs(queries, keys, 4, 2, 24, dtype)
    sinks, slopes = draw(4), draw(4, 4).abs()
    found = run(
        functools.partial(
            attention_varlen, **varlen_lengths(queries, keys), alibi_slopes=slopes, sinks=sinks,
            return_lse=True, impl="cpu",
        ),
        tensors,
    )  # fmt: skip
    first_q = first_k = 0
    for b, (Tq, Tk) in enumerate(zip(queries, keys, strict=True)):
        q, k = slice(first_q, first_q := first_q + Tq), slice(first_k, first_k := first_k + Tk)
        one = {name: x[q if name == "q" else k][None] for name, x in tensors.items()}
        call = functools.partial(
            attention, alibi_slopes=slopes[b], sinks=sinks, return_lse=True, impl="cpu"
        )
        alone = [x[0] for x in run(call, one)]
        assert_same([found[0][q], found[1][:, q], found[2][q], found[3][k], found[4][k]], alone)


@by_dtype
def test_a_sink_of_no_weight_changes_no_bit(dtype: torch.dtype) -> None:
    """Also in a row that sees no key, and among splits."""
    tensors = inputs((2, 40, 37, 4, 2, 16, 33), dtype)
    none = torch.full_like(tensors.pop("sinks"), -math.inf)
    for options in (dict(), dict(window=(4, 1), softcap=2.0, alibi_slopes=[0.1] * 4)):
        call = functools.partial(attention, return_lse=True, impl="cpu", **options)
        assert_same(run(functools.partial(call, sinks=none), tensors), run(call, tensors))
    caches, rest = cache([70, 3, 0, 300], 4, 4, 2, 16, dtype=dtype)
    call = functools.partial(attention_decode, **caches, **rest, return_lse=True, impl="cpu")
    assert_same(call(sinks=none), call())


@by_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_not_a_number_of_a_query_without_keys_reaches_nobody(
    dtype: torch.dtype, masked: bool
) -> None:
    """The first three queries see no key; their sinks make their lse finite."""
    tensors = inputs((1, 50, 47, 4, 2, 16, 33), dtype, slopes=(1, 4))
    mask = torch.ones(50, 47, dtype=torch.bool).tril(-3)
    options = dict(attn_mask=mask, causal=False) if masked else {}
    call = functools.partial(attention, return_lse=True, impl="cpu", **options)
    cotangents = [draw(1, 50, 4, 33).to(dtype), draw(1, 4, 50)]
    names = ["q", "k", "v", "alibi_slopes"]
    wanted = run(call, tensors, cotangents, names)
    tensors["q"][:, :3] = cotangents[0][:, :3] = cotangents[1][..., :3] = torch.nan
    assert_same(run(call, tensors, cotangents, names), wanted)
    assert torch.equal(wanted[1][0, :, 0], tensors["sinks"].float())
    assert not wanted[2][:, :3].any()


@by_dtype
@pytest.mark.parametrize("sink", [torch.nan, 1e30])
def test_a_sink_out_of_range(dtype: torch.dtype, sink: float) -> None:
    """It takes all weight of its own head's queries, or they are NaN; of a query without keys out
    is 0."""
    tensors = inputs((1, 20, 17, 4, 2, 16, 16), dtype)
    call = functools.partial(attention, return_lse=True, impl="cpu")
    wanted = call(**tensors)
    tensors["sinks"] = tensors["sinks"].float()
    tensors["sinks"][1] = sink
    out, lse = call(**tensors)
    others = [0, 2, 3]
    for found, clean in ((out, wanted[0]), (lse.mT, wanted[1].mT)):
        assert torch.equal(found[:, :, others], clean[:, :, others])
    assert not out[:, :3, 1].any()
    seen = out[:, 3:, 1]
    assert seen.isnan().all() if math.isnan(sink) else not seen.any()
    assert torch.equal(lse[:, 1], torch.full((1, 20), sink).float()) or lse[:, 1].isnan().all()


@by_dtype
@pytest.mark.parametrize(
    ("D", "Dv", "options"),
    [
        (16, 33, dict(num_splits=3)),
        (33, 1, dict(causal=False, softcap=3.0)),
        (1, 16, dict(window=(40, 2), causal=False, num_splits=2)),
        (512, 257, dict(window=(9, 0))),
    ],
    ids=str,
)
def test_decoding(dtype: torch.dtype, D: int, Dv: int, options: dict[str, Any], seed: int) -> None:
    """The third entry has no keys, and of the second's queries the first sees none if causal. The
    64 rows that share a key head are two blocks."""
    tensors, rest = cache([70, 3, 0, 300], 4, 16, 1, D, dtype=dtype)
    tensors["v_cache"] = draw(*tensors["v_cache"].shape[:3], Dv, dtype=dtype)
    tensors["k_cache"].nan_to_num_()  # the truth multiplies what lies past a length by 0
    tensors |= {"sinks": draw(16, dtype=dtype), "alibi_slopes": draw(4, 16).abs() * 0.1}
    call = functools.partial(attention_decode, return_lse=True, impl="cpu", **options)
    assert_right(
        attention_decode, tensors, seed, gradients=False, impl="cpu", return_lse=True, **rest,
        **options,
    )  # fmt: skip
    b = slice(3, 4)
    one = {name: x if name == "sinks" else x[b] for name, x in (tensors | rest).items()}
    assert_same(call(**one), [x[b] for x in call(**tensors, **rest)])
