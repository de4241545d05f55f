"""Guesses change no token: with a draft the engine chooses what it chooses without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import GPT, GPTConfig
from gptkernels.core.choice import automatic
from gptkernels.gpt.generation.draft import Lookup, SmallerModel
from gptkernels.gpt.generation.engine import Engine
from gptkernels.gpt.generation.request import Event, Request
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.gpt.tokenizer import load_tokenizer

# Elsewhere a token's logits have other last bits beside others.
pytestmark = pytest.mark.skipif(automatic("cpu") != "cpu", reason="no CPU kernels")
V, CONTEXT = 17, 40


def make(seed: int = 0, **options: Any) -> GPT:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**(sizes | options)))
    for parameter in model.parameters():  # or every token would be as likely
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


MODEL, SMALLER = make(), make(1, n_layer=1, block_size=32)
DRAFTS = {"lookup": "lookup", "smaller": SMALLER, "itself": MODEL}


def steps(model: GPT, request: Request, **options: Any) -> tuple[list[Event], int]:
    """All events, and how many steps they took."""
    engine = Engine(model, slots=1, **options)
    engine.submit(request)
    events, count = [], 0
    while engine.busy:
        events += engine.step()
        count += 1
    return events, count


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("draft_tokens", [1, 3])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, repetition_penalty=1.5),
        Sampling(temperature=0.7, top_k=5, min_p=0.01),
    ],
    ids=["greedy", "penalty", "sampled"],
)
@pytest.mark.parametrize("new", [1, 2, 20, CONTEXT + 9])
def test_tokens_are_those_without_a_draft(
    draft: str, draft_tokens: int, how: Sampling, new: int
) -> None:
    request = Request((3, 1, 4, 1, 5, 9, 2, 6), new, how, seed=5)
    wanted, _ = steps(MODEL, request)
    found, count = steps(MODEL, request, draft=DRAFTS[draft], draft_tokens=draft_tokens)
    assert found == wanted  # tokens, log-probabilities, the last one's reason
    assert [event.finish_reason for event in found] == [None] * (new - 1) + ["length"]
    assert count <= len(found)


def test_a_draft_saves_steps() -> None:
    request = Request((3, 1, 4), 30, Sampling(temperature=0))
    assert steps(MODEL, request)[1] == 30
    assert steps(MODEL, request, draft=MODEL)[1] <= 30 // 4 + 2  # it always guesses right
    assert steps(MODEL, request, draft="lookup")[1] < 30  # a model of random weights repeats itself


@pytest.mark.parametrize("samples", [1, 2])
def test_a_text_ends_at_a_guess_as_without(samples: int) -> None:
    """By eos, behind guesses that were right; then another text begins."""
    tokens = MODEL.generate(torch.tensor([[3, 1, 4]]), 30, temperature=0, slots=1)[0, 3:].tolist()
    eos = next(token for token in tokens[2:] if token not in tokens[:2])
    assert tokens.index(eos) > 1
    first = Request((3, 1, 4), 30, Sampling(temperature=0), eos=eos, samples=samples)
    second = Request((2, 7, 2, 7), 9, Sampling(temperature=0))

    def events(**options: Any) -> list[Event]:
        engine = Engine(MODEL, slots=1, **options)
        engine.submit(first)
        found = engine.step()
        engine.submit(second)
        while engine.busy:
            found += engine.step()
        return found

    wanted = events()
    assert wanted[tokens.index(eos)].finish_reason == "eos"
    assert events(draft=MODEL) == wanted
    assert events(draft="lookup") == wanted


def test_a_draft_in_training_mode_of_another_dtype() -> None:
    draft = make(1, dropout=0.5).to(torch.bfloat16).train()
    request = Request((3, 1, 4), 20, Sampling(temperature=0))
    assert steps(MODEL, request, draft=draft)[0] == steps(MODEL, request)[0]
    assert draft.training
    assert draft.transformer.h[0].attn.training
    engine = Engine(MODEL, draft=draft)
    engine.submit(request)
    modes = []
    hook = draft.transformer.register_forward_hook(lambda module, *_: modes.append(module.training))
    engine.step()
    hook.remove()
    assert set(modes) == {False}


def test_a_stop_string_among_guesses() -> None:
    model = make(vocab_size=256)
    vocabulary = load_tokenizer("bytes")
    request = Request((97, 98, 99), 20, Sampling(temperature=0))
    tokens = [event.token for event in steps(model, request, tokenizer=vocabulary)[0]]
    text = vocabulary.decode(tokens[:7])
    stopped = Request((97, 98, 99), 20, Sampling(temperature=0), stop=(text[-2:],))
    wanted, _ = steps(model, stopped, tokenizer=vocabulary)
    assert steps(model, stopped, tokenizer=vocabulary, draft=model)[0] == wanted
    assert wanted[-1].finish_reason == "stop"


def test_generate_takes_a_draft() -> None:
    tokens = torch.randint(V, (3, 6))
    wanted = MODEL.generate(tokens, 20, temperature=0, slots=1)
    assert torch.equal(MODEL.generate(tokens, 20, temperature=0, draft="lookup"), wanted)
    assert torch.equal(MODEL.generate(tokens, 20, temperature=0, draft=SMALLER), wanted)


def test_a_smaller_vocabulary_is_kept_to() -> None:
    wanted, _ = steps(MODEL, Request((3, 1, 4), 20, Sampling(temperature=0)), vocab_size=9)
    found, _ = steps(
        MODEL, Request((3, 1, 4), 20, Sampling(temperature=0)), vocab_size=9, draft=SMALLER
    )
    assert found == wanted
    assert max(event.token or 0 for event in found) < 9


def test_an_id_that_the_draft_lacks() -> None:
    large = make(vocab_size=30)
    request = Request((3, 25, 4), 12, Sampling(temperature=0))
    wanted, _ = steps(large, request, vocab_size=V)
    assert steps(large, request, vocab_size=V, draft=SMALLER)[0] == wanted


def test_what_was_looked_up() -> None:
    propose = Lookup().propose
    assert propose([1, 2, 3, 4, 1, 2, 3], 3) == [4, 1, 2]
    assert propose([1, 2, 9, 2, 8, 1, 2], 1) == [9]  # two tokens before one
    assert propose([5, 6, 5, 7, 5], 2) == [7, 5]  # the last time
    assert propose([1, 2, 3], 3) == []
    assert propose([4], 3) == []
    assert propose([4, 4], 3) == [4]


def test_a_smaller_model_guesses_its_own_likeliest() -> None:
    """Whatever was guessed and thrown away before, and up to the end of its context."""

    def likeliest(text: list[int], count: int) -> list[int]:
        tokens: Tensor = torch.tensor([text])
        return SMALLER.generate(tokens, count, temperature=0, slots=1)[0, len(text) :].tolist()

    draft = SmallerModel(SMALLER, CONTEXT, V)
    text = [3, 1, 4]
    with torch.no_grad():
        for more in ([], [5], [5, 9], [2], list(range(10)), [1] * 9):
            text = text + more
            assert draft.propose(text, 3) == likeliest(text, 3)
        assert draft.propose([7], 2) == likeliest([7], 2)
        assert draft.propose([1] * 31, 3) == likeliest([1] * 31, 2)
        assert len(draft.propose([1] * 32, 3)) == 1
        assert draft.propose([1] * 33, 3) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(draft="lookup", slots=8), ValueError, "a draft takes slots=1, got 8"),
        (dict(draft=torch.nn.Linear(2, 2)), TypeError, "draft must be 'lookup', a model or None"),
        (dict(draft="look"), ValueError, "draft must be 'lookup', a model or None, got 'look'"),
        (dict(draft="lookup", draft_tokens=4), ValueError, "draft_tokens must be at most 3, got 4"),
        (dict(draft="lookup", draft_tokens=0), ValueError, "draft_tokens"),
        (dict(draft="lookup", draft_tokens=1.5), TypeError, "draft_tokens"),
        (dict(draft=make(vocab_size=11)), ValueError, "must have the model's 17 ids, got 11"),
        (dict(draft=3), TypeError, "draft must be 'lookup', a model or None, got 3"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine(MODEL, **options)
