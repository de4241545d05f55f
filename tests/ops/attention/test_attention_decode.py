"""`attention_decode` against the truth: with caches and with pages, and with the same bits for an
entry in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    HERE,
    IMPLEMENTATIONS,
    each,
    each_kernel_with_cpu,
    of,
    runnable,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_inputs import cache, in_pages, int32
from right import assert_right, assert_same, check_op
from torch import Tensor

from gptkernels import attention_decode
from gptkernels.core.choice import automatic
from gptkernels.ops.attention import splits
from gptkernels.ops.attention.decode import attention_decode_fwd
from gptkernels.ops.attention.options import AttentionOptions
from gptkernels.ops.attention.torch import decode

# impl="torch" gives an entry the same bits in any batch on a CPU only.
KEEPS_BITS = [of(impl) for impl in IMPLEMENTATIONS if impl != "torch" or DEVICE == "cpu"]


def hold(tensors: dict[str, Tensor], rest: dict[str, Any], impl: str, **options: Any) -> None:
    assert_right(attention_decode, tensors, gradients=False, impl=impl, **rest, **options)


SLOPES = [0.5, 0.25, 0.125, 0.1] * 4


@runnable
@pytest.mark.parametrize(
    ("Tq", "page", "options"),
    [
        (1, None, {}),
        (2, 4, {}),
        (2, None, {"num_splits": 3, "return_lse": True}),
        (1, 5, {"num_splits": 2, "return_lse": True, "softcap": 2.0}),
        (1, None, {"window": (5, 0), "return_lse": True}),
        (2, 16, {"window": (90, 0), "num_splits": 4, "return_lse": True}),
        (1, None, {"alibi_slopes": SLOPES, "num_splits": 2, "return_lse": True}),
        (2, 64, {"alibi_slopes": SLOPES, "softcap": 2.0, "softmax_scale": -0.7}),
    ],
    ids=str,
)
def test_each_option(
    impl: str, dtype: torch.dtype, Tq: int, page: int | None, options: dict[str, Any]
) -> None:
    # With num_splits, 64 keys are exactly one split. Of fewer numbers than 16 heads have, PyTorch's
    # error is small by chance now and then.
    hold(*cache([130, 0, 64, 67], Tq, 16, 8, 20, page, dtype), impl, **options)


@each
def test_many_rows(impl: str) -> None:
    """Several blocks of rows, whose tokens see different splits."""
    # The last split has one key, which only the last token sees.
    hold(*cache([129], 9, 8, 1, 64, None, FP16), impl, num_splits=3, return_lse=True)
    hold(*cache([150], 17, 4, 1, 8, 7, FP16), impl, window=(70, 0), num_splits=3)


@each
def test_a_window_wider_than_any_cache(impl: str) -> None:
    hold(*cache([1, 70], 5), impl, window=(2**40, 0), num_splits=2)


@each
def test_more_keys_than_64_parts_of_256(impl: str) -> None:
    # PyTorch's error on a few numbers, each a sum of 701 terms, is random.
    hold(*cache([16385], 1, 8, 4, 32), impl, window=(700, 0), return_lse=True)


@each
@pytest.mark.parametrize("D", [1, 96, 256])
def test_head_widths(impl: str, D: int) -> None:
    heads = 96 if D == 1 else 3  # PyTorch's error on a few numbers is random
    hold(*cache([70], 1, heads, heads, D), impl, num_splits=2, return_lse=True)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    Tq=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 1)]),
    D=st.sampled_from([1, 8, 20]),
    page=st.sampled_from([None, 1, 5, 16]),
    window=st.sampled_from([None, (0, 0), (6, -1)]),
    num_splits=st.sampled_from([None, 1, 2, 7, 2**40]),
    return_lse=st.booleans(),
    impl=st.sampled_from(HERE),
    seed=st.integers(0, 2**32),
)
def test_any_shape(
    lengths: list[int],
    Tq: int,
    heads: tuple[int, int],
    D: int,
    page: int | None,
    seed: int,
    **options: Any,
) -> None:
    torch.manual_seed(seed)
    hold(*cache(lengths, Tq, *heads, D, page), **options)


@pytest.mark.parametrize(
    ("num_splits", "b", "Tq", "D", "dtype"), [(None, 5, 1, 16, FP16), (3, 63, 3, 5, FP32)]
)
@pytest.mark.parametrize("impl", KEEPS_BITS)
def test_the_same_bits_alone_and_in_a_batch_of_64(
    impl: str, num_splits: int | None, b: int, Tq: int, D: int, dtype: torch.dtype
) -> None:
    """An entry has the same bits at any place in the batch, with any capacity of the cache, with
    contiguous caches or pages, and with any strides."""
    lengths = torch.randint(1, 30, (64,)).tolist()
    lengths[b] = 530 if num_splits is None else 170
    tensors, rest = cache(lengths, Tq, D=D, dtype=dtype)
    how = dict(num_splits=num_splits, return_lse=True, impl=impl)
    together = attention_decode(**tensors, **rest, **how)
    n = lengths[b]
    one = {name: x[b : b + 1] for name, x in tensors.items()}
    end = {"cache_lengths": rest["cache_lengths"][b : b + 1]}
    fitting = {name: x if name == "q" else x[:, :n] for name, x in one.items()}
    heads_first = {
        name: x if name == "q" else x.transpose(1, 2).contiguous().transpose(1, 2)
        for name, x in fitting.items()
    }
    padded = cache([n, 1], Tq, D=D, dtype=dtype, capacity=4 * n)[0]
    for name in ("k_cache", "v_cache"):
        padded[name][:1, :n] = one[name][:, :n]
    padded["q"][:1] = one["q"]
    roomy = (padded, {"cache_lengths": int32(n, 1)})
    for given_tensors, given_rest in (
        (fitting, end),
        (heads_first, end),
        in_pages(one, end, 5),
        roomy,
    ):
        found = attention_decode(**given_tensors, **given_rest, **how)
        assert_same([x[0] for x in found], [x[b] for x in together])


@each
@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_bit(impl: str, default: torch.dtype) -> None:
    tensors, rest = cache([130, 0])
    options = dict(alibi_slopes=(0.3, 0.1), num_splits=3, return_lse=True, impl=impl)
    expected = attention_decode(**tensors, **rest, **options)
    torch.set_default_dtype(default)
    try:
        found = attention_decode(**tensors, **rest, **options)
    finally:
        torch.set_default_dtype(FP32)
    for x, right in zip(found, expected, strict=True):
        assert x.dtype == right.dtype
        assert torch.equal(x, right)


@each_kernel_with_cpu
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nonfinite_values_reach_the_tokens_that_see_them_alone(impl: str, num_splits: int) -> None:
    tensors, rest = cache([150, 70], 3, 4, 2)
    how = dict(window=(18, 0), num_splits=num_splits, impl=impl)
    expected = attention_decode(**tensors, **rest, **how)
    tensors["v_cache"][0, 149, 0, 3] = expected[0, 2, :2, 3] = torch.nan  # the last token sees it
    tensors["v_cache"][0, 129, 1, 5] = expected[0, 0, 2:, 5] = torch.inf  # the first token sees it
    tensors["k_cache"][1, 68] = expected[1, 1:] = torch.nan
    out = attention_decode(**tensors, **rest, **how)
    assert torch.equal(out.nan_to_num(7e7, 8e8), expected.nan_to_num(7e7, 8e8))


@each
def test_what_lies_before_the_window_is_not_read(impl: str) -> None:
    tensors, rest = cache([300])
    out = attention_decode(**tensors, **rest, window=(40, 0), num_splits=5, impl=impl)
    for name in ("k_cache", "v_cache"):
        tensors[name][:, : 300 - 41] = torch.nan
    assert torch.equal(
        attention_decode(**tensors, **rest, window=(40, 0), num_splits=5, impl=impl), out
    )


@each_kernel_with_cpu
@pytest.mark.parametrize("page", [None, 8])
def test_kernels_clamp_lengths_and_pages(impl: str, page: int | None) -> None:
    """This calls the op itself, since the public function checks the values of CPU tensors."""
    tensors, rest = cache([24, 24, 0], page=page)
    for name in ("k_cache", "v_cache"):
        tensors[name].nan_to_num_(1.0)
    wrong = dict(rest, cache_lengths=int32(999, 27, -8))
    right = dict(rest, cache_lengths=wrong["cache_lengths"].clamp(0, 27 if page is None else 32))
    if page is not None:
        wrong["block_table"] = wrong["block_table"].clone()
        wrong["block_table"][0, 0], wrong["block_table"][1, 1] = -(2**31), 2**31 - 1
        right["block_table"] = wrong["block_table"].clamp(0, tensors["k_cache"].shape[0] - 1)
    table = (wrong.get("block_table"), right.get("block_table"))
    outs = [
        attention_decode_fwd(
            *tensors.values(), t, 0, *AttentionOptions(0.25, key_lengths=x["cache_lengths"]), impl
        )
        for x, t in zip((wrong, right), table, strict=True)
    ]
    assert_same(*outs)
    assert not outs[1][0][:2].isnan().any()


def at_once(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    window: tuple[int, int] = (-1, 0),
    alibi_slopes: list[float] | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, device=q.device)
    out, lse = torch.zeros_like(q), q.new_full((len(q), q.shape[2], q.shape[1]), -torch.inf)
    options = AttentionOptions(
        q.shape[-1] ** -0.5, window[0], 0, softcap, alibi_slopes=slopes, key_lengths=cache_lengths
    )
    decode._at_once(q, k_cache, v_cache, block_table, options, out, lse)
    return (out, lse) if return_lse else out


class TestTorchOnAGpu:
    """impl="torch" on a GPU: all entries run at once, and the host reads no values."""

    @pytest.mark.parametrize("page", [None, 4, 13])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"window": (5, 0), "return_lse": True},
            {"alibi_slopes": SLOPES[:4], "softcap": 2.0, "return_lse": True},
        ],
        ids=str,
    )
    def test_each_option(
        self, page: int | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decode, "_GATHERED", 2 * 40 * 2 * 16)  # two entries at a time
        tensors, rest = cache([13, 0, 1, 29, 37], 2, 4, 2, 16, page)
        how = dict(name="attention_decode", gradients=False)
        assert_right(at_once, tensors, **how, **rest, **options)

    def test_clamps_lengths_and_pages(self) -> None:
        tensors, rest = cache([24, 24, 24], page=8)
        for name in ("k_cache", "v_cache"):
            tensors[name].nan_to_num_(1.0)
        lengths, table = torch.tensor([999, -3, 24]), rest["block_table"].clone()
        table[0, 0], table[2, 1] = 1000, -1000
        out = at_once(**tensors, cache_lengths=lengths, block_table=table)
        pages = tensors["k_cache"].shape[0]
        right = at_once(
            **tensors, cache_lengths=lengths.clamp(0, 32), block_table=table.clamp(0, pages - 1)
        )
        assert torch.equal(out, right)
        assert (out[1] == 0).all()

    @pytest.mark.parametrize("page", [None, 4])
    def test_reads_nothing_on_the_host(self, page: int | None) -> None:
        """Reading a value of a meta tensor would raise an error."""
        tensors, rest = cache([13, 0], 2, 4, 2, 16, page)
        q, k, v, lengths, *table = (x.to("meta") for x in (*tensors.values(), *rest.values()))
        slopes = torch.ones(4, device="meta")
        options = AttentionOptions(0.25, 5, 0, 2.0, alibi_slopes=slopes, key_lengths=lengths)
        out, lse = decode.attention_decode_fwd(q, k, v, table[0] if table else None, 0, options)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 2)


@given(
    length=st.integers(0, 2**20),
    room=st.integers(0, 2**20),
    num_splits=st.one_of(st.integers(0, 3000), st.just(splits.NUM_SPLITS_LIMIT)),
)
@example(length=16384, room=0, num_splits=0)
@example(length=16385, room=0, num_splits=0)
@settings(max_examples=200)
def test_the_rule_of_parts(length: int, room: int, num_splits: int) -> None:
    size = splits.keys_per_split(length, num_splits)
    parts = max(1, -(-length // size))
    assert size % (64 if num_splits else 256) == 0
    assert parts <= (num_splits or 64)
    assert parts <= splits.most_splits(length + room, num_splits)
    if num_splits and length > 64 * num_splits:  # only the rounding to 64 adds keys
        assert size - 64 < -(-length // num_splits)


@each
@pytest.mark.parametrize(
    ("lengths", "Tq", "capacity", "page"),
    [([], 1, 4, None), ([3], 0, 4, None), ([0, 0], 2, 0, None), ([0], 1, 0, 4)],
    ids=["no entry", "no token", "no room", "no pages"],
)
def test_nothing_to_do(
    impl: str, lengths: list[int], Tq: int, capacity: int, page: int | None
) -> None:
    B = len(lengths)
    q = torch.randn(B, Tq, 2, 8, device=DEVICE)
    shape = (B, capacity, 1, 8) if page is None else (0, page, 1, 8)
    table = None if page is None else torch.zeros(B, 0, dtype=torch.int32, device=DEVICE)
    caches = (torch.randn(shape, device=DEVICE) for _ in range(2))
    ends = int32(*lengths)
    out, lse = attention_decode(q, *caches, ends, block_table=table, return_lse=True, impl=impl)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert lse.shape == (B, 2, Tq)


@pytest.mark.skipif(automatic("cpu") != "cpu", reason="no CPU kernels here")
@pytest.mark.parametrize(("Tq", "impl"), [(1, "cpu"), (4, "cpu"), (5, "torch")])
def test_auto_takes_the_cpu_kernel_for_few_tokens(Tq: int, impl: str) -> None:
    tensors, rest = ({k: x.cpu() for k, x in given.items()} for given in cache([90, 70], Tq))
    found, right = (
        attention_decode(**tensors, **rest, return_lse=True, impl=how) for how in ("auto", impl)
    )
    assert_same(found, right)
    other = {"cpu": "torch", "torch": "cpu"}[impl]
    assert not torch.equal(found[0], attention_decode(**tensors, **rest, impl=other))


def test_no_backward_pass() -> None:
    tensors, rest = cache([4, 7])
    tensors["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no backward pass: call it under torch\.no_grad"):
        attention_decode(**tensors, **rest)
    with torch.no_grad():
        assert not attention_decode(**tensors, **rest).requires_grad


@each
@pytest.mark.parametrize("page", [None, 4])
def test_opcheck(impl: str, page: int | None) -> None:
    tensors, rest = cache([70, 7], 2, 4, 2, 8, page)
    table = rest.get("block_table")
    table = None if table is None else table.clamp(min=0)
    for x in (tensors["k_cache"], tensors["v_cache"]):
        x.nan_to_num_()
    options = AttentionOptions(0.25, right=0, key_lengths=rest["cache_lengths"])
    op = torch.ops.gptkernels.attention_decode_fwd.default
    check_op(op, (*tensors.values(), table, 2, *options, impl))


@each
def test_compile(impl: str) -> None:
    tensors, rest = cache([4, 7], 2, 4, 2, 8, 4)
    rest["block_table"].clamp_(min=0)
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True)
    right = attention_decode(**tensors, **rest, impl=impl)
    assert torch.equal(compiled(**tensors, **rest, impl=impl), right)


TENSORS, REST = cache([4, 7], 1, 4, 2, 8)
PAGES = torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_lengths": torch.tensor([4, 7])}, TypeError, "cache_lengths must be int32"),
        ({"cache_lengths": torch.tensor([4], dtype=torch.int32)}, ValueError, r"shape \(2,\)"),
        (
            {"cache_lengths": torch.tensor([4, 11], dtype=torch.int32)},
            ValueError,
            "cache_lengths must lie between 0 and 10, got 11",
        ),
        (
            {"cache_lengths": torch.tensor([-1, 3], dtype=torch.int32)},
            ValueError,
            "between 0 and 10, got -1",
        ),
        ({"k_cache": torch.zeros(3, 10, 2, 8)}, ValueError, r"k_cache must have shape|that of k_c"),
        ({"v_cache": torch.zeros(2, 9, 2, 8)}, ValueError, r"v_cache must have shape"),
        ({"block_table": PAGES.long()}, TypeError, "block_table must be int32"),
        ({"block_table": PAGES[:1]}, ValueError, r"block_table must have shape \(2, pages\)"),
        ({"block_table": PAGES + 2}, ValueError, r"must name pages 0 \.\.\. 1, got 2"),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1, got 0"),
        ({"num_splits": 1.5}, TypeError, r"num_splits must be an int, got 1\.5"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_decode(**{**TENSORS, **REST, **changes})
