"""`model.generate`: tokens in, tokens out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import sharpened
from torch import Tensor

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.generation.sampling import Sampler, Sampling

VOCAB, CONTEXT = 50, 24


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


def random_model(**fields: Any) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(VOCAB, CONTEXT, n_layer=2, n_head=2, n_embd=32, dropout=0.5, **fields)
    return sharpened(GPT(config), 8.0)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def anew(model: GPT, row: Tensor, new: int, wanted: Sampling, seed: int) -> Tensor:
    """The continuation of one row, the whole context computed again for each token."""
    sampler = Sampler(1, VOCAB, row.device)
    sampler.begin(0, wanted, seed, 0, row.tolist())
    model = copy.deepcopy(model).eval()
    block_size, start = model.config.block_size, 0
    for _ in range(new):
        if len(row) - start > block_size:
            start = len(row) - max(1, block_size // 2)
        token, _ = sampler.choose(model(row[None, start:])[0, -1:])
        row = torch.cat([row, token])
    return row


@settings(deadline=None, max_examples=20)
@given(
    prompt=st.integers(1, CONTEXT),
    new=st.integers(0, 2 * CONTEXT),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 5, 2 * VOCAB]),
    top_p=st.sampled_from([None, 0.9, 1.0]),
    min_p=st.sampled_from([None, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 2**40),
)
def test_the_cache_and_the_batch_change_no_token(
    model: GPT, prompt: int, new: int, seed: int, **options: Any
) -> None:
    tokens = prompts(2, prompt, seed)
    text = model.generate(tokens, new, seed=[seed, 7], **options)
    wanted = Sampling(**options)
    for row, one, its_seed in zip(text, tokens, (seed, 7), strict=True):
        assert torch.equal(row, anew(model, one, new, wanted, its_seed))


def test_hooked_modules_are_called_at_every_step() -> None:
    model = random_model()
    plain = model.generate(prompts(1, 5), CONTEXT, temperature=0.0)
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, __, out: -out)
    model.transformer.h[1].ln_1.register_forward_hook(lambda _, __, y: -y)
    (text,) = model.generate(prompts(1, 5), CONTEXT, temperature=0.0)
    assert torch.equal(text, anew(model, text[:5], CONTEXT, Sampling(0.0), 0))
    assert not torch.equal(text, plain[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_quantised_model_generates() -> None:
    """Its linear layers have no parameters, and their `weight` is a method."""
    model, tokens = random_model().eval(), prompts(1, 5)
    model.transformer = torch.ao.quantization.quantize_dynamic(model.transformer, {torch.nn.Linear})
    wanted = model(tokens)[:, -1].argmax(-1)  # a scale depends on all tokens, so one step alone
    assert torch.equal(model.generate(tokens, 1, temperature=0.0)[:, -1], wanted)


@pytest.mark.parametrize("fields", [{"norm": "post"}, {"window": 3}], ids=["gpt1", "gpt3"])
def test_the_cache_changes_no_token_of_the_family(fields: dict[str, Any]) -> None:
    model = random_model(**fields)
    tokens = prompts(2, 5)
    text = model.generate(tokens, 2 * CONTEXT, seed=[3, 4])
    for row, one, seed in zip(text, tokens, (3, 4), strict=True):
        assert torch.equal(row, anew(model, one, 2 * CONTEXT, Sampling(), seed))


@torch.no_grad()
def test_a_thousand_tokens_beyond_the_context() -> None:
    size = 9
    torch.manual_seed(0)
    model = sharpened(GPT(GPTConfig(VOCAB, size, n_layer=1, n_head=1, n_embd=16)).eval(), 8.0)
    text = model.generate(prompts(1, 1), size + 1000, temperature=0)[0]
    start, contexts, last = 0, [], []
    for end in range(1, len(text)):
        if end - start > size:
            start = end - size // 2
        last.append(end - start - 1)
        contexts.append(torch.cat([text[start:end], torch.zeros(size - end + start).long()]))
    logits = model(torch.stack(contexts))[torch.arange(len(last)), last]
    assert len(last) == size + 1000
    assert torch.equal(text[1:], logits.argmax(-1))


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_smallest_contexts_slide(block_size: int) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB, block_size, n_layer=1, n_head=1, n_embd=8))
    text = model.generate(prompts(1, 1), 20, seed=[5])
    assert torch.equal(text[0], anew(model, prompts(1, 1)[0], 20, Sampling(), 5))


def test_greedy_takes_the_likeliest(model: GPT) -> None:
    text = model.generate(prompts(2, 3), 12, temperature=0)
    model.eval()
    assert torch.equal(text[:, 3:], model(text).argmax(-1)[:, 2:-1])
    for same in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-40}):
        assert torch.equal(text, model.generate(prompts(2, 3), 12, **same))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": VOCAB - 3}, {"top_p": 0.9}, {}], ids=str
)
def test_a_padded_vocabulary_is_never_sampled(model: GPT, options: dict[str, Any]) -> None:
    padded = copy.deepcopy(model)
    with torch.no_grad():
        padded.transformer.ln_f.bias.copy_(padded.lm_head.weight[VOCAB - 1] * 1000)
    tokens = prompts(20, 2) % (VOCAB - 2)
    assert (padded.generate(tokens, 3, **options) == VOCAB - 1).any()
    text = padded.generate(tokens, 3, vocab_size=VOCAB - 2, **options)
    assert text.max() < VOCAB - 2


def test_seeds(model: GPT) -> None:
    first, again, other = (model.generate(prompts(2, 3), 15, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same = prompts(1, 3).expand(2, 3)
    one, two = model.generate(same, 15, seed=1)
    assert not torch.equal(one, two)  # a seed for all is another stream for each row
    assert torch.equal(*model.generate(same, 15, seed=[4, 4]))
    state = torch.get_rng_state()
    model.generate(prompts(2, 3), 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves torch's generator alone
    torch.manual_seed(5)
    first = model.generate(prompts(2, 3), 15)
    assert not torch.equal(model.generate(prompts(2, 3), 15), first)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompts(2, 3), 15), first)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_of_torch(model: GPT, seed: int) -> None:
    texts = [model.generate(prompts(2, 3), 15, seed=seed) for _ in range(2)]
    assert torch.equal(*texts)


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


def test_no_rows(model: GPT) -> None:
    assert model.generate(prompts(0, 3), 4).shape == (0, 7)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -3"):
        model.generate(prompts(0, 3), -3)
    with pytest.raises(TypeError, match=r"eos must be an int, got 2\.5"):
        model.generate(prompts(0, 3), 4, eos=2.5)


def test_modes_are_restored_and_nothing_is_tracked(model: GPT) -> None:
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    text = model.generate(prompts(2, 3), 10, temperature=0)
    assert [module.training for module in model.modules()] == modes
    assert not text.requires_grad
    model.eval()
    assert torch.equal(text, model.generate(prompts(2, 3), 10, temperature=0))  # no dropout


@pytest.mark.parametrize(
    ("tokens", "new", "options", "message"),
    [
        (prompts(1, 25), 0, {}, "tokens must fit into block_size=24, got T=25"),
        (prompts(1, 4), -1, {}, "max_new_tokens must be at least 0, got -1"),
        (prompts(1, 4), 2, {"temperature": -0.5}, "temperature must be finite and at least 0"),
        (prompts(1, 4), 2, {"eos": 50}, r"eos must lie in 0\.\.\.49 or be None, got 50"),
        (
            prompts(1, 4),
            2,
            {"seed": 2**64},
            r"seed must lie in -2\*\*63\.\.\.2\*\*64 - 1 or be",
        ),
        (prompts(1, 4), 2, {"seed": [1, 2]}, "seed must be one for each of 1 rows, got 2"),
        (prompts(1, 4), 2, {"slots": 0}, "slots must be at least 1, got 0"),
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
        (2, {"top_k": 2.5}, r"top_k must be an int, got 2\.5"),
        (2, {"eos": 2.5}, r"eos must be an int, got 2\.5"),
        (2, {"seed": 0.5}, r"seed must be an int, got 0\.5"),
        (2, {"seed": [0.5]}, r"seed must be an int, got 0\.5"),
        (2, {"slots": 1.0}, r"slots must be an int, got 1\.0"),
    ],
)
def test_wrong_types(model: GPT, new: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(prompts(1, 4), new, **options)


def test_tokens_must_be_int64(model: GPT) -> None:
    with pytest.raises(TypeError, match="tokens must be int64, got float32"):
        model.generate(prompts(1, 4).float(), 2)
    with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor, got list"):
        model.generate([[1, 2]], 2)
