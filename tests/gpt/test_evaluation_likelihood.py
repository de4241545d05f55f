"""Likelihoods of continuations, against a plain forward pass of each whole row in fp64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shaken, sharpened

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.evaluation import likelihood
from gptkernels.gpt.evaluation.likelihood import Counts, Likelihood, Question, Scorer
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.truth.plain_gpt import PlainGPT

IDS = 37  # the tokenizer's; the model's are padded to 40
SHAPE = GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
SHAPES: list[dict[str, Any]] = [{}, {"norm": "post"}, {"window": 3}]


def make(seed: int = 0, **fields: Any) -> GPT:
    """Whose probabilities depend on all that it has read. The ids past the tokenizer's are likely,
    and it is left in training mode, with dropout."""
    torch.manual_seed(seed)
    model = shaken(GPT(GPTConfig(**{**SHAPE.__dict__, **fields})), 0.3)
    with torch.no_grad():
        model.transformer.wte.weight[IDS:] *= 3
    return model


@torch.no_grad()
def truth(model: GPT, question: Question) -> list[tuple[float, bool, float]]:
    """For each candidate the log-probability, whether it is greedy, and by how much a logit would
    have to change for that to be otherwise."""
    plain = PlainGPT(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    found = []
    for candidate in question.candidates:
        row = torch.tensor([question.given + candidate])
        logits = plain(row[:, :-1])[0, len(question.given) - 1 :, :IDS]
        target = torch.tensor(candidate)[:, None]
        own = logits.gather(1, target)
        others = logits.scatter(1, target, -math.inf).amax(1, keepdim=True)
        total = logits.log_softmax(1).gather(1, target).sum().item()
        found.append((total, bool((own > others).all()), (own - others).min().abs().item()))
    return found


def assert_scores(model: GPT, questions: list[Question], close: float, **options: Any) -> Counts:
    scorer = Scorer(model, vocab_size=IDS, **options)
    scored = list(scorer.score(iter(questions)))
    assert len(scored) == len(questions)
    for question, likelihoods in zip(questions, scored, strict=True):
        expected = truth(model, question)
        for candidate, got, (total, greedy, margin) in zip(
            question.candidates, likelihoods, expected, strict=True
        ):
            assert got.total == pytest.approx(total, abs=close * len(candidate))
            assert got.tokens == len(candidate)
            assert got.greedy == greedy or margin < 2 * close
    return scorer.counts


token = st.integers(0, IDS - 1)


@st.composite
def questions(draw: st.DrawFn, most: int = 7) -> Question:
    size = draw(st.integers(1, 16))
    tokens = tuple(draw(st.lists(token, min_size=size, max_size=size)))
    room = st.lists(token, min_size=1, max_size=17 - size).map(tuple)
    return Question(tokens, tuple(draw(st.lists(room, min_size=1, max_size=most))))


@pytest.mark.parametrize("impl", [of("torch"), of("cpu", device="cpu")])
@pytest.mark.parametrize("fields", SHAPES, ids=str)
@given(
    seed=st.integers(0, 10**6),
    asked=st.lists(st.one_of(questions(), questions(1)), max_size=9),
    batch_size=st.integers(1, 5),
)
@settings(max_examples=12)
def test_totals_are_those_of_whole_rows(
    impl: str, fields: dict[str, Any], seed: int, asked: list[Question], batch_size: int
) -> None:
    counts = assert_scores(make(seed, **fields).set_impl(impl), asked, 2e-5, batch_size=batch_size)
    assert counts.candidate_tokens == sum(len(c) for one in asked for c in one.candidates)
    # What a row for each candidate would have computed.
    of_rows = sum(len(one.given) * len(one.candidates) for one in asked)
    assert counts.prefix_tokens + counts.reused_tokens == of_rows


@given(seed=st.integers(0, 10**6), asked=st.lists(questions(), min_size=1, max_size=3))
@settings(max_examples=8)
def test_totals_under_autocast(seed: int, asked: list[Question]) -> None:
    assert_scores(make(seed), asked, 0.1, dtype=torch.bfloat16)


@given(seed=st.integers(0, 10**6), asked=st.lists(questions(), min_size=1, max_size=3))
@settings(max_examples=8)
def test_what_all_logits_have_in_common_costs_no_precision(
    seed: int, asked: list[Question]
) -> None:
    """Near -200 a logit of 16 bits has steps of 1."""
    model = make(seed)
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 1
        norm = model.transformer.ln_f
        norm.weight[0], norm.bias[0] = 0, -200
    assert_scores(model, asked, 0.1, dtype=torch.bfloat16)


def test_autocast_narrows_products_and_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    class Noted(SlotCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            caches.append(self)

    monkeypatch.setattr(likelihood, "SlotCache", Noted)
    products = set()
    model = make()
    model.transformer.h[0].mlp.register_forward_hook(lambda _, __, y: products.add(y.dtype))
    scorer = Scorer(model, vocab_size=IDS, dtype=torch.bfloat16)
    list(scorer.score([Question((1, 2, 3), ((4, 5), (6, 7, 8)))]))
    assert products == {torch.bfloat16}
    assert [cache.slots for cache in caches] == [1, 2]
    assert {k.dtype for cache in caches for k, _ in cache._buffers} == {torch.bfloat16}


def watched(model: GPT) -> list[tuple[int, ...]]:
    """The shapes of all tokens that the model is run on."""
    shapes: list[tuple[int, ...]] = []
    whole = model.hidden_states

    def hidden_states(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return whole(tokens, **options)

    model.hidden_states = hidden_states  # type: ignore[method-assign]
    return shapes


def test_a_prefix_is_computed_once() -> None:
    model = make()
    shapes = watched(model)
    scorer = Scorer(model, vocab_size=IDS, batch_size=3)
    given, other = tuple(range(9)), tuple(range(1, 10))
    asked = [
        # Four candidates continue in two rounds of two, the shorter ones first.
        Question(given, ((1, 2, 3, 4), (5,), (1, 2), (6, 7, 8), (1, 2, 3))),
        Question(given, ((5,), (6,))),
        Question(other, ((1, 2), (1, 3))),
        Question(given, ((5,), (6,))),
    ]
    found = list(scorer.score(asked))
    assert shapes == [(1, 9), (2, 2), (2, 3), (1, 9), (2, 1), (1, 9)]
    assert scorer.counts == Counts(
        prefixes=3, prefix_tokens=27, candidate_tokens=21, reused_tokens=9 * (4 + 2 + 1 + 1)
    )
    assert found[3] == found[1]


def test_another_run_follows_the_weights() -> None:
    model, asked = make(), [Question((1, 2, 3), ((4, 5), (6,)))]
    scorer = Scorer(model, vocab_size=IDS)
    (before,) = scorer.score(asked)
    sharpened(model, 1.1)
    model.train()
    (after,) = scorer.score(asked)
    assert before != after
    assert after[0].total == pytest.approx(truth(model, asked[0])[0][0], abs=1e-3)
    assert scorer.counts.prefixes == 2


def test_rows_of_like_length_share_a_batch_and_few_are_read_ahead() -> None:
    model = make()
    shapes, read = watched(model), 0

    def many() -> Iterator[Question]:
        nonlocal read
        for read in range(1000):
            yield Question((1,) * (1 + 14 * (read % 2)), ((2, 3),))

    scored = Scorer(model, vocab_size=IDS, batch_size=4).score(many())
    first, second, third = (next(scored) for _ in range(3))
    assert read < 100
    assert set(shapes) == {(4, 16), (4, 2)}
    assert first == third != second
    # Questions with several candidates are answered one by one.
    waiting = Scorer(model, vocab_size=IDS).score(
        Question((1,), ((2,), (3,))) if i == 0 else pytest.fail("read ahead") for i in range(2)
    )
    assert len(next(waiting)) == 2


def test_the_logits_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_LOGITS", 5 * 4 * SHAPE.vocab_size)
    model = make()
    with mock.patch.object(model, "logits", wraps=model.logits) as head:
        several, alone = ((2,) * 16, (3,) * 7), ((4,) * 16,)
        assert_scores(model, [Question((1,), several), Question((1,), alone)], 2e-5)
    assert max(len(call.args[0]) for call in head.call_args_list) == 5
    # Of the first, one token for both candidates: only what predicts a token is read.
    assert sum(len(call.args[0]) for call in head.call_args_list) == 1 + 15 + 6 + 16


@torch.no_grad()
def test_greedy_candidates() -> None:
    """What the model generates is greedy behind any question; one token more or less decides."""
    model = make().eval()
    text = model.generate(torch.tensor([[1, 2, 3]]), 6, temperature=0, vocab_size=IDS)[0].tolist()
    likely = tuple(text[3:])
    for place in range(6):
        wrong = (*likely[:place], (likely[place] + 1) % IDS, *likely[place + 1 :])
        several = Question((1, 2, 3), (likely, wrong, likely[:1]))
        alone = [Question((1, 2, 3), (one,)) for one in several.candidates]
        (together, *rows) = Scorer(model, vocab_size=IDS).score([several, *alone])
        assert [one.greedy for one in together] == [True, False, True]
        assert [row[0].greedy for row in rows] == [True, False, True]


def test_the_plans_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a table of measurements says of sizes, as in generation."""
    inside: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def running(choices: str, device_type: str) -> Iterator[None]:
        inside.append((choices, device_type))
        yield
        inside.pop()

    monkeypatch.setattr(likelihood, "choices_of", lambda _: "chosen")
    monkeypatch.setattr(likelihood, "running", running)
    model, seen = make(), []
    model.transformer.h[0].register_forward_hook(lambda *_: seen.append(list(inside)))
    model.lm_head.register_forward_hook(lambda *_: seen.append(list(inside)))
    asked = [Question((1,), ((2,),)), Question((1,), ((2, 3), (4,)))]
    list(Scorer(model, vocab_size=IDS).score(asked))
    assert seen == [[("chosen", "cpu")]] * 6


def test_no_questions() -> None:
    scorer = Scorer(make(), vocab_size=IDS)
    assert list(scorer.score([])) == []
    assert scorer.counts == Counts()


def test_likelihoods_add_up() -> None:
    one, other = Likelihood(-1.5, 2, True), Likelihood(-0.5, 1, False)
    assert one + other == Likelihood(-2.0, 3, False)
    assert (one + one).greedy


@pytest.mark.parametrize("candidates", [((5,), (6, 7)), ((6, 7),), ((5,), (8,))])
def test_broken_weights_are_named(candidates: tuple[tuple[int, ...], ...]) -> None:
    model = make()
    with torch.no_grad():
        model.transformer.wpe.weight[2] = math.nan
    with pytest.raises(RuntimeError, match=r"hold NaN or infinity: its weights are broken, or too"):
        list(Scorer(model, vocab_size=IDS).score([Question((1, 2, 3), candidates)]))


def test_questions_that_are_none() -> None:
    for tokens, candidates, message in [
        ((), ((1,),), "given must hold at least one token"),
        ((1,), (), "candidates must be at least one, each of at least one token"),
        ((1,), ((2,), ()), "candidates must be at least one, each of at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            Question(tokens, candidates)
    model = make()
    scorer = Scorer(model, vocab_size=IDS)
    fits = Question((1,) * 15, ((2, 2), (3,)))
    assert len(list(scorer.score([fits, Question((1,), ((2,) * 16,))]))) == 2
    for question, message in [
        (Question((1,) * 15, ((2, 2), (2, 2, 2))), "block_size=16, got 15 tokens and a candidate"),
        (Question((IDS,), ((2,),)), "ids must lie in 0...36, got 37"),
        (Question((1,), ((2,), (3, -1))), "ids must lie in 0...36, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(scorer.score([question]))
    for options, error, message in [
        ({"vocab_size": 41}, ValueError, "at most the model's 40, got 41"),
        ({"vocab_size": IDS, "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"vocab_size": 1.0}, TypeError, "vocab_size must be an int"),
    ]:
        with pytest.raises(error, match=message):
            Scorer(model, **options)  # type: ignore[arg-type]
