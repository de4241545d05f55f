from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.generate import _choose, generate

VOCAB, CONTEXT = 50, 24


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


def random_model(**fields: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB, CONTEXT, n_layer=2, n_head=2, n_embd=32, dropout=0.5, **fields))
    with torch.no_grad():  # far from the nearly even probabilities of a fresh model
        for parameter in model.parameters():
            parameter.mul_(8.0)
    return model


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3),
    prompt=st.integers(1, CONTEXT),
    new=st.integers(0, CONTEXT),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 1, 5, VOCAB, 2 * VOCAB]),
    top_p=st.sampled_from([None, 0.1, 0.9, 1.0]),
    eos=st.sampled_from([None, 7]),
    seed=st.integers(0, 2**40),
)
def test_the_cache_changes_no_token(
    model: GPT, rows: int, prompt: int, new: int, seed: int, **options: Any
) -> None:
    tokens = prompts(rows, prompt, seed)
    new = min(new, CONTEXT - prompt)
    cached = model.generate(tokens, new, seed=seed, **options)
    assert torch.equal(cached, generate(model, tokens, new, seed=seed, use_cache=False, **options))
    assert torch.equal(cached[:, :prompt], tokens)
    assert cached.shape[1] == prompt + new or options["eos"] is not None


@pytest.mark.parametrize("fields", [{"norm": "post"}, {"window": 3}], ids=["gpt1", "gpt3"])
def test_the_cache_changes_no_token_of_the_family(fields: dict[str, Any]) -> None:
    model = random_model(**fields)
    tokens = prompts(2, 5)
    cached = model.generate(tokens, CONTEXT - 5, seed=3)
    assert torch.equal(cached, generate(model, tokens, CONTEXT - 5, seed=3, use_cache=False))


def test_greedy_takes_the_likeliest(model: GPT) -> None:
    text = model.generate(prompts(2, 3), 12, temperature=0)
    model.eval()
    assert torch.equal(text[:, 3:], model(text).argmax(-1)[:, 2:-1])
    assert torch.equal(text, model.generate(prompts(2, 3), 12, top_k=1))
    assert torch.equal(text, model.generate(prompts(2, 3), 12, top_p=1e-9))
    for tiny in (1e-30, 1e-40, 1e-50, 5e-324):  # normal, subnormal and zero in fp32
        assert torch.equal(text, model.generate(prompts(2, 3), 12, temperature=tiny))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": VOCAB - 3}, {"top_p": 0.9}, {}], ids=str
)
def test_a_padded_vocabulary_is_never_sampled(model: GPT, options: dict[str, Any]) -> None:
    padded = copy.deepcopy(model)
    with torch.no_grad():
        padded.transformer.ln_f.bias.copy_(padded.lm_head.weight[VOCAB - 1] * 1000)
    tokens = prompts(50, 2) % (VOCAB - 2)
    assert (padded.generate(tokens, 3, **options) == VOCAB - 1).any()
    text = padded.generate(tokens, 3, vocab_size=VOCAB - 2, **options)
    assert text.max() < VOCAB - 2


def test_a_top_p_of_one_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def spy(probabilities: Tensor, count: int, **_: Any) -> Tensor:
        drawn.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", spy)
    logits = torch.tensor([[0.0] + [-20.0] * 9])  # the first probability alone sums to 1 in fp32
    for top_p in (None, 1.0, 0.9):
        _choose(logits, 1.0, None, top_p, None)
    assert torch.equal(drawn[0], drawn[1])
    assert [int(p.count_nonzero()) for p in drawn] == [10, 10, 1]


def test_samples_follow_the_distribution(model: GPT) -> None:
    rows = 20_000
    tokens = prompts(1, 4).expand(rows, 4)
    logits = model.eval()(prompts(1, 4))[0, -1].double()
    order = logits.argsort(descending=True)
    for temperature, top_k, top_p in [
        (1.0, None, None),
        (2.0, 6, None),
        (3.0, None, 0.6),
        (2.5, 9, 0.8),
    ]:
        expected = (logits / temperature).softmax(0)
        if top_k is not None:
            expected[order[top_k:]] = 0
            expected /= expected.sum()
        if top_p is not None:
            count = int((expected[order].cumsum(0) < top_p).sum()) + 1
            assert 1 < count < VOCAB
            expected[order[count:]] = 0
            expected /= expected.sum()
        text = model.generate(tokens, 1, temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
        counts = torch.bincount(text[:, -1], minlength=VOCAB)
        assert (counts[expected == 0] == 0).all()
        # Six standard deviations of a binomial count.
        spread = 6 * (rows * expected * (1 - expected)).sqrt() + 1
        assert ((counts - rows * expected).abs() <= spread).all()


def test_seeds(model: GPT) -> None:
    first, again, other = (model.generate(prompts(2, 3), 15, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    model.generate(prompts(2, 3), 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves torch's generator alone
    torch.manual_seed(5)
    first = model.generate(prompts(2, 3), 15)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompts(2, 3), 15), first)


def test_eos_ends_rows_and_stops(model: GPT) -> None:
    free = model.generate(prompts(3, 4), 20, temperature=0)
    eos = int(free[0, 6])
    text = model.generate(prompts(3, 4), 20, temperature=0, eos=eos)
    ends = []
    for row, free_row in zip(text, free, strict=True):
        where = (free_row[4:] == eos).nonzero()
        end = 4 + int(where[0]) if where.numel() else 23
        ends.append(end)
        assert torch.equal(row[: end + 1], free_row[: end + 1])
        assert (row[end + 1 :] == eos).all()
    assert text.shape[1] == max(ends) + 1
    one = model.generate(prompts(3, 4)[:1], 20, temperature=0, eos=eos)
    assert one.shape[1] <= 7


def test_modes_are_restored_and_nothing_is_tracked(model: GPT) -> None:
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    text = model.generate(prompts(2, 3), 10, temperature=0)
    assert [module.training for module in model.modules()] == modes
    assert not text.requires_grad
    model.eval()
    assert torch.equal(text, model.generate(prompts(2, 3), 10, temperature=0))  # no dropout
    model.train()
    with pytest.raises(ValueError):
        model.generate(prompts(2, 3), 10, temperature=-1)
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "new", "options", "message"),
    [
        (prompts(1, 20), 5, {}, r"fit into block_size=24 together, got 20 \+ 5"),
        (prompts(1, 25), 0, {}, "tokens must fit into block_size=24, got T=25"),
        (prompts(1, 4), -1, {}, "max_new_tokens must be at least 0, got -1"),
        (prompts(1, 4), 2, {"temperature": -0.5}, "temperature must be finite and at least 0"),
        (prompts(1, 4), 2, {"temperature": float("inf")}, "temperature must be finite"),
        (prompts(1, 4), 2, {"temperature": float("nan")}, "temperature must be finite"),
        (prompts(1, 4), 2, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (prompts(1, 4), 2, {"top_p": 0.0}, "top_p must lie above 0 and at most at 1"),
        (prompts(1, 4), 2, {"top_p": 1.5}, "top_p must lie above 0 and at most at 1"),
        (prompts(1, 4), 2, {"eos": 50}, r"eos must lie in 0\.\.\.49 or be None, got 50"),
        (
            prompts(1, 4),
            2,
            {"seed": 2**64},
            r"seed must lie in -2\*\*63\.\.\.2\*\*64 - 1 or be",
        ),
        (prompts(1, 4), 2, {"vocab_size": 51}, "vocab_size must be at most the model's 50, got 51"),
        (prompts(1, 4), 2, {"vocab_size": 0}, "vocab_size must be"),
        (prompts(1, 4), 2, {"vocab_size": 7, "eos": 7}, "eos must lie in 0...6"),
        (prompts(1, 4), 2, {"seed": -(2**63) - 1}, "seed must lie in"),
        (prompts(1, 4)[0], 2, {}, r"tokens must have shape \(B, T\) with T >= 1, got \(4,\)"),
        (prompts(2, 4)[:, :0], 2, {}, r"tokens must have shape \(B, T\) with T >= 1"),
        (prompts(1, 4) + 60, 2, {}, r"tokens must lie in 0\.\.\.49"),
    ],
)
def test_bad_input(
    model: GPT, tokens: Tensor, new: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, new, **options)


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        (2.5, {}, r"max_new_tokens must be an int, got 2\.5"),
        (True, {}, "max_new_tokens must be an int, got True"),
        (2, {"temperature": "1"}, "temperature must be a number, got '1'"),
        (2, {"temperature": None}, "temperature must be a number, got None"),
        (2, {"top_k": 2.5}, r"top_k must be an int, got 2\.5"),
        (2, {"top_p": "0.9"}, r"top_p must be a number, got '0\.9'"),
        (2, {"eos": 2.5}, r"eos must be an int, got 2\.5"),
        (2, {"seed": 0.5}, r"seed must be an int, got 0\.5"),
    ],
)
def test_wrong_types(model: GPT, new: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(prompts(1, 4), new, **options)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_of_torch(model: GPT, seed: int) -> None:
    texts = [model.generate(prompts(2, 3), 15, seed=seed) for _ in range(2)]
    assert torch.equal(*texts)


def test_tokens_must_be_int64(model: GPT) -> None:
    with pytest.raises(TypeError, match="tokens must be int64, got float32"):
        model.generate(prompts(1, 4).float(), 2)
    with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor, got list"):
        model.generate([[1, 2]], 2)
