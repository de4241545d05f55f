"""flash_attn_with_kvcache: what it writes into the caches, and attention's results against the
truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import DEVICE, FP16
from op_inputs import draw, in_pages, int32
from torch import Tensor

from gptkernels.flash_attn_interface import flash_attn_with_kvcache, kvcache
from gptkernels.truth import baseline, parity, reference

B, TMAX, H, HK, D = 3, 40, 8, 4, 24
HELD, NEW = [0, 21, 33], 5
SLOPES = torch.linspace(0.1, 1.1, B * H, device=DEVICE).view(B, H)


def caches(page: int | None = None) -> dict[str, Any]:
    """Caches of random numbers; with pages, and a table of them."""
    tensors = {
        "q": draw(B, 7, H, D, dtype=FP16),
        "k_cache": draw(B, TMAX, HK, D, dtype=FP16),
        "v_cache": draw(B, TMAX, HK, D, dtype=FP16),
    }
    if page is None:
        return tensors
    paged, rest = in_pages(tensors, {"cache_lengths": int32(*[TMAX] * B)}, page)
    return {**paged, "block_table": rest["block_table"]}


def new() -> dict[str, Tensor]:
    return {name: draw(B, NEW, HK, D, dtype=FP16) for name in "kv"}


def rows(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Each entry's row of the cache, (B, Tmax, Hk, D)."""
    return cache if block_table is None else cache[block_table.long()].flatten(1, 2)[:, :TMAX]


def truth(of: Any, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> list[Tensor]:
    """(out, lse) of one entry's keys."""
    options = {"causal": False, **named, "return_lse": True}
    options["window"] = options.pop("window_size", None)
    out, lse = of.attention(q[None], k[None], v[None], **options)
    return [out[0], lse[0].masked_fill(lse[0] == -math.inf, math.inf)]


def assert_right(
    found: tuple[Tensor, Tensor], q: Tensor, keys: list[tuple[Tensor, Tensor]], **named: Any
) -> None:
    """Holds out and lse of each entry to the truth; keys are its keys and values."""
    results: list[list[Tensor]] = []
    for of, cast in ((baseline, lambda x: x), (reference, parity.upcast)):
        entries = []
        for b, (k, v) in enumerate(keys):
            own = dict(named)
            if isinstance(own.get("alibi_slopes"), Tensor):
                own["alibi_slopes"] = own["alibi_slopes"].expand(B, H)[b]
            entries.append(truth(of, *map(cast, (q[b], k, v)), own))
        results.append([torch.stack(of_all) for of_all in zip(*entries, strict=True)])
    for result, yardstick, right in zip(found, *results, strict=True):
        verdict = parity.compare(result, yardstick, right, k=parity.K_FORWARD)
        assert verdict.passed, verdict


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (9, 3)},
    {"causal": True, "window_size": (9, -1), "softcap": 2.0, "softmax_scale": 0.4},
    {"alibi_slopes": SLOPES[0]},
    {"alibi_slopes": SLOPES, "causal": True},
]
each_option = pytest.mark.parametrize("named", OPTIONS, ids=lambda named: "-".join(named))


@each_option
@pytest.mark.parametrize("page", [None, 16], ids=["rows", "pages"])
def test_new_keys_are_written_and_seen(page: int | None, named: dict[str, Any]) -> None:
    given, fresh = caches(page), new()
    table = given.get("block_table")
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    wanted = {name: rows(x, table).clone() for name, x in before.items()}
    for name, x in wanted.items():
        for b, held in enumerate(HELD):
            x[b, held : held + NEW] = fresh[name[0]][b]

    found = flash_attn_with_kvcache(
        **given, **fresh, cache_seqlens=int32(*HELD), return_softmax_lse=True, **named
    )
    for name, x in wanted.items():
        assert torch.equal(rows(given[name], table), x)
        bits = (each.view(torch.int16) for each in (given[name], before[name]))
        changed = torch.ne(*bits).any(-1).any(-1)
        assert int(changed.sum()) == B * NEW, "nothing else is written"
    keys = [
        (wanted["k_cache"][b, : held + NEW], wanted["v_cache"][b, : held + NEW])
        for b, held in enumerate(HELD)
    ]
    assert_right(found, given["q"], keys, **named)


@each_option
@pytest.mark.parametrize("picked", [False, True], ids=["own rows", "cache_batch_idx"])
def test_left_padding_and_other_rows(picked: bool, named: dict[str, Any]) -> None:
    """Keys before cache_leftpad are not seen, and positions count from there."""
    given, fresh, pads = caches(), new(), [2, 0, 30]
    order = [2, 0, 1] if picked else [0, 1, 2]
    index = int32(*order) if picked else None
    kept = given["k_cache"].clone()
    found = flash_attn_with_kvcache(
        **given, **fresh, cache_seqlens=int32(*HELD), cache_batch_idx=index,
        cache_leftpad=int32(*pads), return_softmax_lse=True, **named,
    )  # fmt: skip
    keys = []
    for b, (row, held, pad) in enumerate(zip(order, HELD, pads, strict=True)):
        kept[row, held : held + NEW] = fresh["k"][b]
        keys.append(tuple(given[name][row, pad : held + NEW] for name in ("k_cache", "v_cache")))
    assert torch.equal(given["k_cache"], kept)
    assert_right(found, given["q"], keys, **named)


def test_nothing_is_written_without_new_keys() -> None:
    """The caches hold as many keys as an int says, or without one all; num_splits changes no more
    than the rounding."""
    given = caches()
    before = given["k_cache"].clone()
    for length, splits in ((17, 0), (TMAX, 3), (None, 1)):
        found = flash_attn_with_kvcache(
            **given, cache_seqlens=length, num_splits=splits, return_softmax_lse=True
        )
        keys = [(given["k_cache"][b, :length], given["v_cache"][b, :length]) for b in range(B)]
        assert_right(found, given["q"], keys)
    assert torch.equal(given["k_cache"], before)
    alone = flash_attn_with_kvcache(**given, cache_seqlens=17)
    assert torch.equal(alone, flash_attn_with_kvcache(**given, cache_seqlens=int32(17, 17, 17)))


def test_other_rows_alone_and_strided_caches() -> None:
    """cache_batch_idx without padding; the caches are views of a larger one."""
    given = caches()
    large = {name: draw(4, 50, 2 * HK, D, dtype=FP16) for name in ("k_cache", "v_cache")}
    views = {name: x[:, 5:45, ::2] for name, x in large.items()}
    found = flash_attn_with_kvcache(
        given["q"], **views, cache_seqlens=int32(3, 9, 40), cache_batch_idx=int32(3, 0, 0),
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    keys = [
        (views["k_cache"][row, :n], views["v_cache"][row, :n])
        for row, n in ((3, 3), (0, 9), (0, 40))
    ]
    assert_right(found, given["q"], keys, causal=True)
    first = flash_attn_with_kvcache(given["q"][:2], **views, cache_seqlens=9, causal=True)
    first_rows = {name: x[:2] for name, x in views.items()}
    wanted = flash_attn_with_kvcache(given["q"][:2], **first_rows, cache_seqlens=9, causal=True)
    assert torch.equal(first, wanted), "a cache of more rows"

    before = large["k_cache"].clone()
    fresh = new()
    flash_attn_with_kvcache(
        given["q"], **views, **fresh, cache_seqlens=int32(3, 9, 30), cache_batch_idx=int32(3, 0, 1)
    )
    before[1, 35:40, ::2] = fresh["k"][2]
    assert torch.equal(large["k_cache"][1], before[1])


WRONG = [
    ({"rotary_cos": torch.ones(1)}, "rotary_cos is not supported"),
    ({"rotary_sin": torch.ones(1)}, "rotary_sin is not supported"),
    ({"cache_seqlens": None}, "cache_seqlens must say where k and v are written, got None"),
    ({"cache_seqlens": 36}, "cache_seqlens must lie between 0 and 35 before 5 new tokens, got 36"),
    ({"cache_seqlens": int32(0, -1, 2)}, "cache_seqlens must lie between 0 and 35 .* entry 1"),
    ({"cache_seqlens": int32(0, 1)}, r"cache_seqlens must have shape \(3,\)"),
    ({"cache_seqlens": int32(0, 1, 2).long()}, "cache_seqlens must be int32, got int64"),
    ({"cache_seqlens": 2.5}, "cache_seqlens must be an int or an int32 tensor, got 2.5"),
    ({"cache_leftpad": int32(0, 9, 2)}, "cache_leftpad must lie between 0 and 8"),
    ({"cache_batch_idx": int32(0, 1, 3)}, "cache_batch_idx must lie between 0 and 2, got 3"),
    ({"v": None}, "k and v must be given together, got no v"),
    ({"k": None}, "k and v must be given together, got no k"),
    ({"k": []}, "k must be a torch.Tensor, got list"),
    ({"k": torch.zeros(B, NEW, HK, D)}, "k must have the dtype of k_cache, float16"),
    ({"v": torch.zeros(B, 4, HK, D).half()}, r"v must have shape \(3, 5, 4, 24\)"),
    ({"num_splits": -1}, "num_splits must be 0 or more, got -1"),
    ({"num_splits": 1.0}, "num_splits must be an int, got 1.0"),
    ({"softmax_scale": "a"}, "softmax_scale must be a number, got 'a'"),
    ({"alibi_slopes": torch.ones(H + 1)}, "alibi_slopes must have shape"),
    ({"q": torch.zeros(B, 7, 3, D).half()}, "the heads of q must be a multiple"),
    ({"k_cache": None}, "k_cache must be a tensor with four dimensions, got None"),
    (
        {"k": torch.zeros(B, NEW, HK, D).half().requires_grad_()},
        "flash_attn_with_kvcache has no backward pass: call it under torch.no_grad",
    ),
    (
        {"alibi_slopes": torch.zeros(H, requires_grad=True)},
        "flash_attn_with_kvcache has no backward pass",
    ),
    (
        {"block_table": int32(0, 1, 2)[:, None], "cache_leftpad": int32(0, 0, 0)},
        "cache_leftpad is not supported together with block_table",
    ),
    (
        {"block_table": int32(0, 1, 2)[:, None], "cache_batch_idx": int32(0, 0, 0)},
        "cache_batch_idx is not supported together with block_table",
    ),
    ({"block_table": [[0], [1], [2]]}, r"block_table must be a tensor \(B, pages\)"),
    ({"block_table": int32(0, 1, 2)}, r"block_table must be a tensor \(B, pages\), got \(3,\)"),
    ({"block_table": int32(0, 1, -1)[:, None]}, "block_table must name pages 0 ... 2, got -1"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_where_an_argument_is_wrong_nothing_is_written(
    wrong: dict[str, Any], sentence: str
) -> None:
    given = {**caches(), **new(), "cache_seqlens": 3}
    cache = given["k_cache"]
    before = cache.clone()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError), match=sentence):
        flash_attn_with_kvcache(**{**given, **wrong})
    assert torch.equal(cache, before)


def test_num_splits_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """0, flash-attn's word for its own choice, leaves it to ours."""
    seen: list[Any] = []
    record = lambda *_, **named: seen.append(named["num_splits"])  # noqa: E731
    monkeypatch.setattr(kvcache, "attention_decode", record)
    for splits in (0, 1, 7):
        flash_attn_with_kvcache(**caches(), cache_seqlens=9, num_splits=splits)
    assert seen == [None, 1, 7]


def test_rotary_interleaved_says_nothing_without_rotary_cos() -> None:
    given = caches()
    found = flash_attn_with_kvcache(**given, cache_seqlens=9, rotary_interleaved=False)
    assert torch.equal(found, flash_attn_with_kvcache(**given, cache_seqlens=9))
