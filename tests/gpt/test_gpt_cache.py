"""The cache of a model: slots that begin, go on and end by themselves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import shaken
from right import Calls
from torch import Tensor
from torch.func import functional_call

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.truth import plain_gpt
from gptkernels.truth.parity import assert_parity

SMALL = GPTConfig(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16)


def random_model(**fields: Any) -> GPT:
    return shaken(GPT(GPTConfig(**{**SMALL.__dict__, **fields})).eval())


def poisoned(model: GPT, slots: int, max_tokens: int = 16) -> SlotCache:
    """A cache that holds NaN wherever nothing was stored."""
    cache = SlotCache(model, slots, max_tokens)
    for k, v in cache._buffers:
        k.fill_(math.nan)
        v.fill_(math.nan)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"norm": "post"}, {"window": 3}], ids=str)
def test_slots_of_different_lengths_go_on(fields: dict[str, Any]) -> None:
    model = random_model(**fields).set_impl("torch")  # the plain twin's operators
    tokens, begun = torch.randint(37, (4, 16)), (5, 1, 0, 9)
    cache = poisoned(model, 4)
    first = [
        model(tokens[b : b + 1, :n], cache=cache, slot=b) if n else None
        for b, n in enumerate(begun)
    ]
    parts = []
    for start, count in ((0, 1), (1, 4), (5, 2)):
        new = [tokens[b, n + start : n + start + count] for b, n in enumerate(begun)]
        parts.append(model(torch.stack(new), cache=cache))
    assert cache.lengths.tolist() == [12, 8, 0, 16]  # slot 2 was never begun
    rest = torch.cat(parts, dim=1)
    named = {n.replace(".", "__"): p.detach() for n, p in model.named_parameters()}
    for b in (0, 1, 3):
        ours = torch.cat([first[b], rest[b : b + 1]], dim=1)
        twin = plain_gpt.PlainGPT(model.config)

        def plain(b: int = b, twin: Any = twin, **given: Tensor) -> Tensor:
            given = {name.replace("__", "."): tensor for name, tensor in given.items()}
            text = tokens[b : b + 1, : begun[b] + 7]
            return functional_call(twin, given, (text,), tie_weights=True)

        assert_parity(lambda ours=ours, **_: ours, plain, plain, named, gradients=False)


@torch.no_grad()
def test_a_slot_is_copied_and_given_up() -> None:
    model = random_model()
    tokens = torch.randint(37, (1, 9))
    prompt, cache = poisoned(model, 1), poisoned(model, 3)
    model(tokens[:, :8], cache=prompt, slot=0)
    for slot in (2, 0):
        cache.copy(slot, prompt, 0, 8)
    new = tokens[:, 8:].expand(3, 1)
    logits = model(new, cache=cache)
    assert torch.equal(logits[0], logits[2])
    cache.release(2)
    cache.copy(0, prompt, 0, 8)
    assert torch.equal(model(new, cache=cache)[0], logits[0])
    assert cache.lengths.tolist() == [9, 0, 0]


@torch.no_grad()
def test_many_slots_are_filled_by_one_copy_of_each_buffer() -> None:
    model = random_model()
    tokens = torch.randint(37, (1, 9))
    prompt, cache = poisoned(model, 1), poisoned(model, 9)
    model(tokens[:, :8], cache=prompt, slot=0)
    with Calls(torch.ops.aten.copy_.default) as copies:
        cache.copy(slice(1, None), prompt, 0, 8)
    assert len(copies) == 2 * model.config.n_layer
    assert cache.lengths.tolist() == [0] + [8] * 8
    logits = model(tokens[:, 8:].expand(9, 1), cache=cache)[1:, -1]
    torch.testing.assert_close(logits, model(tokens)[:, -1].expand(8, -1))


def test_what_does_not_fit_leaves_the_cache_as_it_was() -> None:
    model = random_model()
    cache = SlotCache(model, 2, 12)
    with torch.no_grad():
        model(torch.zeros(1, 9).long(), cache=cache, slot=1)
    held = copy.deepcopy(cache._buffers)
    for tokens, options, message in [
        ((2, 4), {}, "at most max_tokens=12 tokens a slot, got 4 after 9"),
        ((2, 8), {}, "fit into block_size=16, got T=8 after 9 in the cache"),
        ((1, 13), {"slot": 0}, "at most max_tokens=12 tokens a slot, got 13 after 0"),
        ((3, 1), {}, "a row for each slot, 2, got 3"),
        ((2, 1), {"slot": 0}, "a row for each slot, 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(torch.zeros(tokens).long(), cache=cache, **options)
    with pytest.raises(RuntimeError, match="a KVCache is for inference"):
        model(torch.zeros(2, 1).long(), cache=cache)
    assert cache.lengths.tolist() == [0, 9]
    for before, after in zip(held, cache._buffers, strict=True):
        assert all(torch.equal(a[1, :9], b[1, :9]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("wrong", [(0, 4), (4, 0)])
def test_a_cache_has_slots_and_room(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SlotCache(random_model(), *wrong)


def test_the_cache_has_the_dtype_that_attention_computes_in() -> None:
    model = random_model().bfloat16()
    assert {t.dtype for pair in SlotCache(model, 1, 4)._buffers for t in pair} == {torch.bfloat16}
    model.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = SlotCache(model, 2, 4)
        assert cache._buffers[0][0].dtype == torch.bfloat16
        model(torch.zeros(1, 2).long(), cache=cache, slot=0)
        assert model(torch.zeros(2, 1).long(), cache=cache)[0].isfinite().all()


def test_slots_change_places() -> None:
    """Those that are read and written at once; what they have in common stays."""
    cache = SlotCache(random_model(), 4, 9)
    for k, v in cache._buffers:
        for buffer in (k, v):
            buffer[:] = torch.randn(buffer.shape[1:])
            buffer[:, 3:] = torch.randn(buffer[:, 3:].shape)
    before = copy.deepcopy(cache._buffers)
    cache.reorder([1, 0, 1], 3, 7)
    assert cache.lengths.tolist() == [7, 7, 7, 7]
    for ours, theirs in zip(cache._buffers, before, strict=True):
        for now, then in zip(ours, theirs, strict=True):
            assert torch.equal(now[:3, :7], then[[1, 0, 1], :7])
            assert torch.equal(now[:, :3], then[:, :3])


@torch.no_grad()
def test_a_slot_without_a_source_is_one_later() -> None:
    model, cache = random_model(), SlotCache(random_model(), 3, 16)
    text = torch.randint(37, (1, 7))
    for slot in range(3):
        model(text[:, :5], cache=cache, slot=slot)
    cache.reorder([0], 5, 5)
    model(text[:, 5:6].expand(3, 1), cache=cache)
    cache.reorder([0, 0, 0], 5, 6)
    logits = model(text[:, 6:].expand(3, 1), cache=cache)
    torch.testing.assert_close(logits[:, -1], model(text)[:, -1].expand(3, -1))
