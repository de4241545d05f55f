"""One native call for all blocks of a GPT gives the bits that its layers give, or is not made."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from harness import by_dtype, threads
from torch import Tensor, nn

from gptkernels import GPT, GPTConfig
from gptkernels.core.choice import automatic
from gptkernels.gpt import model as model_file
from gptkernels.gpt.cached_blocks import cached_blocks
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.gpt.model import PreNormBlock
from gptkernels.nn.layers import MLP, CausalSelfAttention, KVCache

pytestmark = pytest.mark.skipif(
    automatic("cpu") != "cpu", reason="no CPU kernels that auto would take"
)


def make(dtype: torch.dtype = torch.float32, **options: Any) -> GPT:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, block_size=40, n_layer=3, n_head=4, n_embd=36)
    model = GPT(GPTConfig(**(sizes | options)))
    for parameter in model.parameters():  # biases are 0 otherwise
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def continued(model: GPT, slots: int = 3, steps: int = 4) -> list[Tensor]:
    """The logits of some steps behind prompts of different lengths, and all keys and values."""
    cache = SlotCache(model, slots, 30)
    torch.manual_seed(1)
    for slot in range(slots - 1):  # the last one stays empty
        model(torch.randint(61, (1, 3 + 5 * slot % 23)), cache=cache, slot=slot)
    found = [model(torch.randint(61, (slots, 1)), cache=cache)[: slots - 1] for _ in range(steps)]
    held = [buffer[: slots - 1, :7] for pair in cache._buffers for buffer in pair]
    return found + held


def by_layers(model: GPT, **options: Any) -> list[Tensor]:
    with mock.patch.object(model_file, "cached_blocks", return_value=None):
        return continued(model, **options)


def native(model: GPT, **options: Any) -> tuple[list[Tensor], int]:
    """The same, and how many steps were native."""
    steps: list[bool] = []
    with mock.patch.object(model_file, "cached_blocks", watched(steps)):
        return continued(model, **options), sum(steps)


def watched(steps: list[bool]) -> Callable[..., Tensor | None]:
    """cached_blocks, which notes whether a step was native."""

    def function(*arguments: Any) -> Tensor | None:
        found = cached_blocks(*arguments)
        steps.append(found is not None)
        return found

    return function


def assert_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@by_dtype
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("options", "slots"),
    [
        (dict(), 2),
        (dict(norm="post"), 2),
        (dict(bias=False), 2),
        (dict(window=4), 2),
        (dict(n_layer=1), 2),
        (dict(approximate="none", n_inner=50), 16),
        (dict(bias=False), 16),
    ],
    ids=str,
)
def test_bits_are_those_of_the_layers(
    dtype: torch.dtype, options: dict[str, Any], slots: int
) -> None:
    model = make(dtype, **options)
    found, steps = native(model, slots=slots)
    assert steps == 4
    assert_bits(found, by_layers(model, slots=slots))


@by_dtype
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", [dict(), dict(norm="post"), dict(window=4)], ids=str)
def test_several_tokens_have_the_bits_of_one_after_another(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = make(dtype, **options)
    tokens = torch.randint(61, (3, 4))
    with torch.no_grad():
        caches = [SlotCache(model, 3, 30) for _ in range(3)]
        for cache in caches:
            for slot in range(3):
                torch.manual_seed(slot)
                model(torch.randint(61, (1, 3 + 4 * slot)), cache=cache, slot=slot)
        one_by_one = [model(tokens[:, i : i + 1], cache=caches[0]) for i in range(4)]
        steps: list[bool] = []
        with mock.patch.object(model_file, "cached_blocks", watched(steps)):
            found = model(tokens, cache=caches[1])
        assert steps == [True]
        with mock.patch.object(model_file, "cached_blocks", return_value=None):
            assert torch.equal(model(tokens, cache=caches[2]), found)
    assert torch.equal(torch.cat(one_by_one, 1), found)


def test_bits_do_not_depend_on_slots_or_threads() -> None:
    model = make(torch.bfloat16)
    with threads(7):
        wanted = continued(model, slots=3)
    with threads(1):
        assert_bits(continued(model, slots=3), wanted)
    # One text alone, in one slot.
    alone = SlotCache(model, 1, 30)
    texts = SlotCache(model, 8, 30)
    torch.manual_seed(1)
    prompt, following = torch.randint(61, (1, 6)), torch.randint(61, (3, 1, 1))
    with torch.no_grad():
        model(prompt, cache=alone, slot=0)
        for slot in (0, 5):
            model(prompt, cache=texts, slot=slot)
        for token in following:
            one = model(token, cache=alone)
            many = model(token.expand(8, 1), cache=texts)
            assert torch.equal(many[5:6], one)


def replaced(model: GPT) -> None:
    class Linear(nn.Linear):
        """Such as an adapter's."""

    old = model.transformer.h[1].mlp.c_fc
    new = Linear(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.transformer.h[1].mlp.c_fc = new


def transposed(model: GPT) -> None:
    layer = model.transformer.h[0].attn.c_proj
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def without_weight(model: GPT) -> None:
    norm = model.transformer.h[0].ln_2
    norm.weight = norm.bias = None


def in_a_sequence(model: GPT) -> None:
    mlp = model.transformer.h[1].mlp
    mlp.c_fc = nn.Sequential(mlp.c_fc)


def of_another_class(model: GPT) -> None:
    class Block(type(model.transformer.h[0])):  # type: ignore[misc]
        """Such as a user's."""

    model.transformer.h[2].__class__ = Block


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: hook(model.transformer.h[1]),
        lambda model: hook(model.transformer.h[2].attn.c_attn),
        lambda model: hook(model.transformer.h[0].mlp),
        lambda model: model.transformer.h[1].ln_1.register_forward_pre_hook(lambda *_: None),
        lambda model: model.transformer.ln_f.register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.transformer.h[1].attn, "impl", "torch"),
        lambda model: setattr(model.transformer.h[1].ln_2, "impl", "torch"),
        replaced,
        in_a_sequence,
        of_another_class,
        transposed,
        without_weight,
    ],
)
def test_changed_models_run_by_their_layers(change: Callable[[GPT], None]) -> None:
    model = make()
    change(model)
    found, steps = native(model)
    assert_bits(found, by_layers(model))
    assert steps == 0


def test_a_hook_of_a_block_is_called() -> None:
    model, seen = make(), []
    model.transformer.h[1].attn.register_forward_hook(lambda *_: seen.append(1))
    continued(model)
    assert len(seen) == 2 + 4  # the prompts, and the steps
    assert native(model)[1] == 0


def test_what_watches_is_told() -> None:
    model = make()
    with torch.profiler.profile() as profile:
        assert native(model)[1] == 0
    assert any("attention_decode" in event.name for event in profile.events())


def test_other_modes_run_by_the_layers() -> None:
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native(model)[1] == 0
    assert native(copy.deepcopy(model).train())[1] == 4  # without dropout nothing differs
    assert native(make(dropout=0.1).train())[1] == 0
    assert native(model, slots=17)[1] == 0
    assert native(make().set_impl("torch"))[1] == 0
    mixed = make()
    mixed.transformer.h[0].ln_1.to(torch.float64)
    with pytest.raises(TypeError, match="float64"):
        native(mixed)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dropout_outside_the_blocks_is_not_left_out(norm: str) -> None:
    model = make(norm=norm, dropout=0.5).train()
    model.transformer.h.eval()
    assert native(model)[1] == 0


def test_a_quantised_model_runs_by_its_layers() -> None:
    model = torch.ao.quantization.quantize_dynamic(make(), {nn.Linear}, dtype=torch.qint8)
    found, steps = native(model)
    assert steps == 0
    assert_bits(found, by_layers(model))


def test_a_patched_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x))
    assert native(make())[1] == 0


def test_fewer_key_heads() -> None:
    """GPT has none; its attention may be replaced by a layer that has."""
    model = make(torch.bfloat16)
    for block in model.transformer.h:
        block.attn = CausalSelfAttention(36, 4, 2).to(torch.bfloat16).eval()
    found, steps = native(model)
    assert steps == 4
    assert_bits(found, by_layers(model))


def step_of(model: GPT, block: int, **changes: Any) -> Tensor | None:
    """One native step behind 3 tokens, of two slots, with changes to a block's cache."""
    cache = SlotCache(model, 2, 5)
    with torch.no_grad():
        for slot in range(2):
            model(torch.randint(61, (1, 3)), cache=cache, slot=slot)
        caches = cache.caches(1)
        given = vars(caches[block]) | changes
        caches[block] = given.pop("kind", KVCache)(**given)
        x = torch.randn(2, 1, 36)
        return cached_blocks(model.transformer.h, None, x, caches, PreNormBlock)


def test_other_caches_run_by_the_layers() -> None:
    model = make()
    assert step_of(model, 1) is not None

    class Counting(KVCache):
        """Such as one that quantises."""

    class Other(types.SimpleNamespace):
        """One that does not hold k and v as tensors."""

    rows, positions = torch.arange(2)[:, None], torch.full((2, 1), 3)
    half = torch.zeros(2, 5, 4, 9, dtype=torch.float16)
    with torch.inference_mode():
        fresh = torch.zeros(2, 5, 4, 9)
    for changes in (
        dict(kind=Counting),
        dict(places=(rows, positions)),
        dict(places=None),
        dict(lengths=torch.full((2,), 4, dtype=torch.int32)),
        dict(k=half),
        dict(v=fresh),
        dict(v=torch.zeros(2, 4, 5, 9).transpose(1, 2)),
    ):
        assert step_of(model, 1, **changes) is None, changes
    assert step_of(model, 0, kind=Other, k=None) is None


def test_slots_in_another_order_are_left_to_the_layers() -> None:
    model = make(n_layer=1)
    k, v = torch.zeros(2, 2, 5, 4, 9)
    x, lengths = torch.randn(2, 1, 36), torch.full((2,), 4, dtype=torch.int32)
    for slots, native_call in (([[0], [1]], True), ([[1], [0]], False)):
        cache = KVCache(k, v, (torch.tensor(slots), torch.full((2, 1), 3)), lengths)
        with torch.no_grad():
            found = cached_blocks(model.transformer.h, None, x, [cache], PreNormBlock)
        assert (found is not None) is native_call


@pytest.mark.parametrize(("n_head", "head_dim", "n_kv_head"), [(1, 520, 1), (4, 65, 3)])
def test_heads_that_do_not_fit_are_left_to_the_layers(
    n_head: int, head_dim: int, n_kv_head: int
) -> None:
    """A layer's attributes can be changed after it was made."""
    C = n_head * head_dim
    model = make(n_layer=1, n_embd=C)
    attn = model.transformer.h[0].attn
    attn.n_head, attn.head_dim, attn.n_kv_head = n_head, head_dim, n_kv_head
    attn.c_attn = nn.Linear(C, (n_head + 2 * n_kv_head) * head_dim)
    k, v = torch.zeros(2, 1, 5, n_kv_head, head_dim)
    places = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 3)
    cache = KVCache(k, v, places, torch.tensor([4], dtype=torch.int32))
    with torch.no_grad():
        x = torch.randn(1, 1, C)
        assert cached_blocks(model.transformer.h, None, x, [cache], PreNormBlock) is None


@pytest.mark.parametrize(("position", "length"), [(-1, 4), (5, 4), (3, 6), (3, -1)])
def test_numbers_past_the_cache_are_left_to_the_layers(position: int, length: int) -> None:
    model = make(n_layer=1)
    k, v = torch.zeros(2, 1, 5, 4, 9)
    places = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[position]])
    cache = KVCache(k, v, places, torch.tensor([length], dtype=torch.int32))
    x = torch.randn(1, 1, 36)
    with torch.no_grad():
        assert cached_blocks(model.transformer.h, None, x, [cache], PreNormBlock) is None


def test_a_transform_is_left_to_the_layers() -> None:
    """Its tensors have no memory of their own to point to."""
    model, found = make(n_layer=1), []

    def call(x: Tensor) -> Tensor:
        caches = SlotCache(model, 2, 5).caches(1)
        found.append(cached_blocks(model.transformer.h, None, x, caches, PreNormBlock))
        return x

    with torch.no_grad():
        torch.func.vmap(call)(torch.randn(1, 2, 1, 36))
    assert found == [None]


def test_changed_parameters_are_seen() -> None:
    """In place, by .data, by another parameter; nothing of the old ones is kept."""
    model, layer = make(), None
    continued(model)
    for change in (
        lambda layer: layer.weight.data.mul_(1.5),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 1.5)),
        lambda layer: layer.weight.detach().add_(0.25),
    ):
        layer = model.transformer.h[1].attn.c_proj
        change(layer)
        found, steps = native(model)
        assert steps == 4
        assert_bits(found, by_layers(model))


def test_a_full_cache_is_refused_as_by_the_layers() -> None:
    model = make()
    cache = SlotCache(model, 1, 4)
    with torch.no_grad():
        model(torch.randint(61, (1, 4)), cache=cache, slot=0)
        with pytest.raises(ValueError, match="at most max_tokens=4"):
            model(torch.randint(61, (1, 1)), cache=cache)


def test_gradients_are_refused_as_by_the_layers() -> None:
    model = make()
    cache = SlotCache(model, 1, 9)
    with torch.no_grad():
        model(torch.randint(61, (1, 4)), cache=cache, slot=0)
    with pytest.raises(RuntimeError, match="inference"):
        model(torch.randint(61, (1, 1)), cache=cache)
