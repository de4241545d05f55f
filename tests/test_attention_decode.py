"""`attention_decode` against the truth: caches, pages, and what an entry gets in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptkernels import attention_decode, baseline, reference
from gptkernels.ops.attention_decode import _decode
from gptkernels.parity import assert_parity


def cache(
    lengths: list[int],
    Tq: int,
    H: int,
    Hk: int,
    D: int,
    page: int | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the rest): what lies past a length, and pages of nobody, are NaN."""
    B = len(lengths)
    q = torch.randn(B, Tq, H, D).to(dtype)
    ends = torch.tensor(lengths, dtype=torch.int32)
    longest = max([*lengths, 1])
    if page is None:
        k, v = (torch.randn(B, longest + 3, Hk, D).to(dtype) for _ in range(2))
        dead = torch.arange(longest + 3) >= ends[:, None]
        for x in (k, v):
            x[dead] = torch.nan
        return dict(q=q, k_cache=k, v_cache=v), dict(cache_lengths=ends)
    pages = -(-longest // page)
    table = torch.randperm(B * pages + 2)[: B * pages].view(B, pages).to(torch.int32)
    k, v = (torch.full((B * pages + 2, page, Hk, D), torch.nan).to(dtype) for _ in range(2))
    for b, length in enumerate(lengths):
        for j in range(length):
            k[table[b, j // page], j % page] = torch.randn(Hk, D).to(dtype)
            v[table[b, j // page], j % page] = torch.randn(Hk, D).to(dtype)
        table[b, -(-length // page) :] = -7  # never read
    return dict(q=q, k_cache=k, v_cache=v), dict(cache_lengths=ends, block_table=table)


def hold(tensors: dict[str, Tensor], rest: dict[str, Any], **options: Any) -> None:
    splits = {"num_splits": options.pop("num_splits", None)}
    assert_parity(
        lambda **x: attention_decode(**x, **rest, **options, **splits),
        lambda **x: baseline.attention_decode(**x, **rest, **options),
        lambda **x: reference.attention_decode(**x, **rest, **options),
        tensors,
        gradients=False,
        names=("out", "lse"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_splits": 3},
        {"window": (5, 0)},
        {"window": (5, 0), "num_splits": 4},
        {"softcap": 2.0, "return_lse": True},
        {"alibi_slopes": [0.5, 0.25, 0.125, 0.1], "num_splits": 2, "return_lse": True},
        {"softmax_scale": 0.7},
    ],
    ids=str,
)
def test_each_option(dtype: torch.dtype, page: int | None, options: dict[str, Any]) -> None:
    hold(*cache([13, 0, 1, 29], 2, 4, 2, 16, page, dtype), **options)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 24), min_size=1, max_size=4),
    Tq=st.integers(1, 16),
    heads=st.sampled_from([(1, 1), (4, 2), (8, 1)]),
    D=st.sampled_from([1, 8, 20]),
    page=st.sampled_from([None, 1, 5, 16]),
    window=st.sampled_from([None, (0, 0), (6, -1)]),
    num_splits=st.sampled_from([None, 1, 2, 7, 40]),
    return_lse=st.booleans(),
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


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_has_the_same_bits_alone_and_in_a_batch_of_64(
    dtype: torch.dtype, num_splits: int | None
) -> None:
    lengths = torch.randint(1, 90, (64,)).tolist()
    tensors, rest = cache(lengths, 1, 8, 2, 32, 8, dtype)
    together, lse = attention_decode(**tensors, **rest, num_splits=num_splits, return_lse=True)
    for b in (0, 17, 63):
        own = {name: x[b : b + 1] for name, x in rest.items()}
        alone = attention_decode(
            tensors["q"][b : b + 1], tensors["k_cache"], tensors["v_cache"], **own,
            num_splits=num_splits, return_lse=True,
        )  # fmt: skip
        assert torch.equal(alone[0][0], together[b])
        assert torch.equal(alone[1][0], lse[b])


def test_no_backward_pass() -> None:
    tensors, rest = cache([4, 7], 1, 2, 1, 8, None)
    tensors["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no backward pass: call it under torch\.no_grad"):
        attention_decode(**tensors, **rest)
    with torch.no_grad():
        assert not attention_decode(**tensors, **rest).requires_grad


def test_opcheck_and_compile() -> None:
    tensors, rest = cache([4, 7], 2, 4, 2, 8, 4)
    rest["block_table"].clamp_(min=0)
    arguments = (*tensors.values(), *rest.values(), None, 0.25, -1, 0, 0.0, 2, "torch")
    torch.library.opcheck(_decode, arguments)
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**tensors, **rest), attention_decode(**tensors, **rest))


TENSORS, REST = cache([4, 7], 1, 4, 2, 8, None)
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
        ({"impl": "cuda"}, NotImplementedError, "attention_decode runs with impl='torch' only"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_decode(**{**TENSORS, **REST, **changes})
