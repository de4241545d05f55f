"""Beam search, beside one that is written out and computes every text anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import sharpened

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.generation.beam import Beam, beam_search
from gptkernels.gpt.generation.text import TextStream
from gptkernels.gpt.tokenizer import ByteTokenizer

# Log-probabilities of a dozen tokens, in fp32, by other products.
CLOSE = dict(rel=1e-4, abs=1e-5)
IMPLS = [of("torch", device="cpu"), of("cpu", device="cpu")]
ALPHAS = [-1.0, 0.0, 0.6, 1.0, 3.0]


def make(V: int, seed: int = 0, **fields: Any) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(V, 24, n_layer=2, n_head=2, n_embd=16, dropout=0.5, **fields)
    return sharpened(GPT(config), 5.0).eval()


@dataclass
class Plain:
    """Continuations of `prompt` by whole forward passes."""

    model: GPT
    prompt: list[int]
    longest: int
    alpha: float = 0.6
    eos: int | None = None
    stop: Sequence[str] = ()
    ids: int | None = None
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def next(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities of what follows, fp64."""
        if tokens not in self.known:
            logits = self.model(torch.tensor([self.prompt + list(tokens)]))[0, -1, : self.ids]
            self.known[tokens] = logits.double().log_softmax(-1)
        return self.known[tokens]

    def logprob(self, tokens: tuple[int, ...]) -> float:
        return sum(float(self.next(tokens[:i])[token]) for i, token in enumerate(tokens))

    def score(self, tokens: tuple[int, ...]) -> float:
        return self.logprob(tokens) / ((5 + len(tokens)) / 6) ** self.alpha

    def text(self, tokens: tuple[int, ...]) -> tuple[str, bool]:
        """What an ASCII text says before a stop string; whether there was one."""
        said = "".join(map(chr, tokens))
        places = [said.find(stop) for stop in self.stop if stop in said]
        return (said[: min(places)], True) if places else (said, False)

    def ended(self, tokens: tuple[int, ...]) -> bool:
        return tokens[-1] == self.eos or len(tokens) == self.longest or self.text(tokens)[1]

    def exhaustive(self) -> float:
        """The best score of all continuations."""
        V = len(self.next(()))
        texts = itertools.chain.from_iterable(
            itertools.product(range(V), repeat=n) for n in range(1, self.longest + 1)
        )
        whole = [
            tokens
            for tokens in texts
            if self.ended(tokens) and not any(self.ended(tokens[:i]) for i in range(1, len(tokens)))
        ]
        return max(map(self.score, whole))

    def searched(self, width: int) -> tuple[int, ...]:
        """The search without a stop before its time."""
        beams, over = [()], []
        while beams:
            every = [(*beam, token) for beam in beams for token in range(len(self.next(())))]
            every.sort(key=self.logprob, reverse=True)
            over += [tokens for tokens in every[:width] if self.ended(tokens)]
            beams = [tokens for tokens in every if not self.ended(tokens)][:width]
        return max(over, key=self.score)


def search(plain: Plain, width: int, **options: Any) -> Beam:
    return beam_search(
        plain.model, plain.prompt, plain.longest, width=width, alpha=plain.alpha, eos=plain.eos,
        stop=plain.stop, vocab_size=plain.ids, **options,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", ALPHAS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**20), eos=st.sampled_from([None, 0, 2]))
def test_with_a_beam_for_every_text_it_is_exhaustive(
    impl: str, alpha: float, seed: int, eos: int | None
) -> None:
    V, longest = 3, 4
    plain = Plain(make(V, seed).set_impl(impl), [1, 2], longest, alpha, eos)
    found = search(plain, V ** (longest - 1))
    assert found.score == pytest.approx(plain.exhaustive(), **CLOSE)
    assert found.score == pytest.approx(plain.score(found.tokens), **CLOSE)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10)
@given(
    width=st.integers(1, 6),
    longest=st.integers(1, 7),
    alpha=st.sampled_from(ALPHAS),
    eos=st.sampled_from([None, 3]),
    fields=st.sampled_from([{}, {"norm": "post"}, {"window": 3}]),
    seed=st.integers(0, 2**20),
)
def test_it_finds_what_the_written_out_search_finds(
    impl: str, width: int, longest: int, fields: dict[str, Any], seed: int, **options: Any
) -> None:
    plain = Plain(make(7, seed, **fields).set_impl(impl), [1, 2, 6], longest, ids=5, **options)
    tokens = plain.searched(width)
    found = search(plain, width)
    assert found.tokens == tokens
    assert found.text == ""
    assert found.logprob == pytest.approx(plain.logprob(tokens), **CLOSE)
    assert found.score == pytest.approx(plain.score(tokens), **CLOSE)


@settings(max_examples=10)
@given(width=st.integers(1, 4), alpha=st.sampled_from(ALPHAS), seed=st.integers(0, 2**20))
def test_a_stop_string_of_several_tokens_ends_a_text(width: int, alpha: float, seed: int) -> None:
    tokenizer = ByteTokenizer()
    plain = Plain(make(256, seed), [65, 66], 6, alpha, eos=10, ids=128)
    free = search(plain, width, tokenizer=tokenizer)
    assert free.text == "".join(map(chr, free.tokens)).removesuffix("\n")
    plain.stop = (free.text[-2:] or "?", free.text[1:3] or "!")
    tokens = plain.searched(width)
    found = search(plain, width, tokenizer=tokenizer)
    assert found.tokens == tokens
    assert found.text == plain.text(tokens)[0].removesuffix("\n")
    assert found.score == pytest.approx(plain.score(tokens), **CLOSE)


@pytest.mark.parametrize("alpha", [-1.0, 0.0])
def test_one_beam_is_greedy(alpha: float) -> None:
    model = make(11)
    for eos in (None, *range(11)):
        prompt = torch.tensor([[3, 1, 4]])
        wanted = model.generate(prompt, 9, temperature=0, slots=1, eos=eos)[0, 3:].tolist()
        found = beam_search(model, [3, 1, 4], 9, width=1, alpha=alpha, eos=eos)
        assert list(found.tokens) == wanted


def test_more_beams_find_likelier_texts_than_one() -> None:
    found = [beam_search(make(11, seed), [3, 1], 9, width=1).score for seed in range(5)]
    more = [beam_search(make(11, seed), [3, 1], 9, width=8).score for seed in range(5)]
    assert sum(more) > sum(found) + 0.1


def passes(model: GPT, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of tokens that the model will be run on."""
    seen, plain = [], model.hidden_states

    def counted(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return plain(tokens, **options)

    monkeypatch.setattr(model, "hidden_states", counted)
    return seen


def test_the_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(11)
    seen = passes(model, monkeypatch)
    beam_search(model, list(range(11)), 5, width=4)
    assert seen == [(1, 11), (4, 1), (4, 1), (4, 1), (4, 1)]


def saying(*steps: list[float]) -> GPT:
    """A model with these probabilities at the first steps, and the last of them at all others."""
    model, left = make(len(steps[0])), list(steps)

    def said(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        now = left.pop(0) if len(left) > 1 else left[0]
        return torch.tensor(now).log().expand(logits.shape)

    model.lm_head.register_forward_hook(said)
    return model


def table(*rows: list[float]) -> GPT:
    """A model with these probabilities behind each token."""
    model, read, logprobs = make(len(rows)), [], torch.tensor(rows).log()

    def embedded(_: Any, tokens: tuple[torch.Tensor], __: Any) -> None:
        read.append(tokens[0][:, -1])

    def said(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logprobs[read[-1][: len(logits)]]

    model.transformer.wte.register_forward_hook(embedded)
    model.lm_head.register_forward_hook(said)
    return model


END, A, B, OTHERS = 0, 1, 2, [0.15, 0.1]
EVEN = [0.2] * 5


@pytest.mark.parametrize(
    ("width", "alpha", "behind", "tokens", "score"),
    [
        # The end is the likeliest, A the second. Only the third, B, has a likely continuation.
        (2, 0.6, {B: [0, 0, 1, 0, 0]}, (B,) * 10, math.log(0.2) / 2.5**0.6),
        # One beam looks behind an end where a longer text may get a better score.
        (1, 0.6, {A: [0, 1, 0, 0, 0]}, (A,) * 10, math.log(0.25) / 2.5**0.6),
        (1, 0.0, {A: [0, 1, 0, 0, 0]}, (END,), math.log(0.3)),
    ],
)  # fmt: skip
def test_an_end_takes_no_beams_place(
    width: int, alpha: float, behind: dict[int, list[float]], tokens: tuple[int, ...], score: float
) -> None:
    first = [0.3, 0.25, 0.2, *OTHERS]
    model = table(first, *(behind.get(token, EVEN) for token in range(1, 5)))
    found = beam_search(model, [END], 10, width=width, alpha=alpha, eos=END)
    assert found.tokens == tokens
    assert found.score == pytest.approx(score)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_beams_go_on_however_many_tokens_end_a_text(width: int) -> None:
    """Behind the prompt only y is likelier than the ten digits, which are stop strings; z, which
    is not, says itself for certain."""
    behind = [[1 / 256] * 256] * 256
    behind[ord("z")] = [float(token == ord("z")) for token in range(256)]
    ends = list("0123456789")
    odds = {ord(end): 0.08 + int(end) / 1000 for end in ends} | {ord("y"): 0.1, ord("z"): 0.05}
    behind[ord("?")] = [odds.get(token, 0.0) for token in range(256)]
    options = {"width": width, "stop": ends, "tokenizer": ByteTokenizer()}
    assert beam_search(table(*behind), [ord("?")], 6, alpha=3.0, **options).text == "zzzzzz"


def test_no_more_continuations_are_looked_at_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    push, seen = TextStream.push, []

    def counted(stream: TextStream, token: int) -> str:
        seen.append(token)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", counted)
    beam_search(make(256), [65], 3, width=2, tokenizer=ByteTokenizer())
    assert len(seen) == 2 + 2 + 1


def test_it_stops_where_no_beam_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    model = saying([0.1, 0.9])
    seen = passes(model, monkeypatch)
    assert beam_search(model, [0], 20, eos=1).tokens == (1,)
    # The longest text's penalty is 2.35, with which a log-probability of 0.1 ** 1 is still less.
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("alpha", "steps", "tokens"),
    [
        # The end's score is ln 0.55 = -0.60; that of n zeros is -0.67 for n = 2, -0.21 for 19.
        (3.0, [[0.45, 0.55]], (0,) * 19 + (1,)),
        # The end's is ln 0.4 = -0.92, and that of 0 and an end 7 / 6 * ln 0.594 = -0.61; with more
        # tokens a score only falls.
        (-1.0, [[0.6, 0.4], [0.01, 0.99]], (0, 1)),
    ],
)
def test_it_goes_on_while_a_beam_may_win(
    alpha: float, steps: list[list[float]], tokens: tuple[int, ...]
) -> None:
    assert beam_search(saying(*steps), [0], 20, width=2, alpha=alpha, eos=1).tokens == tokens


def test_of_equals_the_lower_ids_of_the_earlier_beams() -> None:
    model = make(40)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert beam_search(model, [3], 4, width=5).tokens == (0, 0, 0, 0)
    found = beam_search(model, [3], 2, width=3, alpha=0.0)
    assert found.tokens == (0, 0)
    assert found.score == found.logprob == pytest.approx(-2 * math.log(40))


def test_a_token_without_any_probability_is_no_continuation() -> None:
    """And more beams than continuations do no harm."""
    found = beam_search(saying([0.0, 0.3, 0.0, 0.7]), [3], 6, width=40, eos=2, alpha=0.0)
    assert found.tokens == (3,) * 6
    assert found.score == pytest.approx(6 * math.log(0.7))


def test_autocast_does_not_narrow_the_logits() -> None:
    """Near -200 those of 16 bits have steps of 1."""
    plain = Plain(make(11), [3, 1, 4], 6)
    with torch.no_grad():
        plain.model.transformer.wte.weight[:, 0] = 1
        norm = plain.model.transformer.ln_f
        norm.weight[0], norm.bias[0] = 0, -200
    with torch.autocast("cpu", torch.bfloat16):
        found = search(plain, 4)
    assert found.logprob == pytest.approx(plain.logprob(found.tokens), abs=0.1)


def test_modes_are_restored_and_nothing_is_dropped() -> None:
    model = make(11)
    wanted = beam_search(model, [3, 1, 4], 9)
    model.train().transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert beam_search(model, [3, 1, 4], 9) == wanted
    assert [module.training for module in model.modules()] == modes


def test_broken_weights_are_one_sentence() -> None:
    model = make(11)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[0] = math.nan
    message = "logits hold NaN or infinity behind 2 tokens of the prompt: its weights are broken"
    with pytest.raises(RuntimeError, match=message):
        beam_search(model, [3, 1], 4)


@pytest.mark.parametrize(
    ("tokens", "new", "options", "error", "message"),
    [
        ([], 3, {}, ValueError, "the prompt is empty; it must hold at least one token"),
        ([3, 11], 3, {}, ValueError, r"tokens must lie in 0\.\.\.10"),
        ([3] * 20, 5, {}, ValueError, "must fit into block_size=24 together, got 20 [+] 5 tokens"),
        ([3], 0, {}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ([3], 2.5, {}, TypeError, r"max_new_tokens must be an int, got 2\.5"),
        ("3", 2, {}, TypeError, "tokens must be a sequence of int, got '3'"),
        ([3], 3, {"width": 0}, ValueError, "width must be at least 1, got 0"),
        ([3], 3, {"alpha": 11}, ValueError, r"alpha must lie in -10\.0\.\.\.10\.0, got 11"),
        ([3], 3, {"alpha": math.nan}, ValueError, "alpha must lie in"),
        ([3], 3, {"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
        ([3], 3, {"eos": 9, "vocab_size": 9}, ValueError, r"eos must lie in 0\.\.\.8 or be None"),
        ([3], 3, {"vocab_size": 12}, ValueError, "vocab_size must be at most the model's 11, got"),
        ([3], 3, {"stop": ["a"]}, ValueError, "stop strings need a tokenizer, got none"),
        ([3], 3, {"stop": [""]}, ValueError, "stop must hold no empty string"),
    ],
)
def test_bad_input(
    tokens: Any, new: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        beam_search(make(11), tokens, new, **options)


def test_the_whole_context_can_be_used() -> None:
    assert len(beam_search(make(11), [3] * 20, 4).tokens) == 4
