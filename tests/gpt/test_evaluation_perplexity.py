"""Perplexity by a sliding window: the context of each token, what counts, and that it adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from begun import Begun
from harness import DATA
from hypothesis import given
from hypothesis import strategies as st
from models import shaken

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.evaluation.likelihood import Likelihood, Question, Scorer
from gptkernels.gpt.evaluation.perplexity import Perplexity, exponential, perplexity
from gptkernels.gpt.tokenizer import ByteTokenizer
from gptkernels.truth.plain_gpt import PlainGPT

SHAPE = GPTConfig(vocab_size=260, block_size=12, n_layer=2, n_head=2, n_embd=16)


class Ending(ByteTokenizer):
    """Bytes with an end of text."""

    vocab_size = 257
    eos = 256


class Recorder(Scorer):
    """Finds each token equally likely, and keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def score(self, questions: Iterable[Question]) -> Iterator[tuple[Likelihood, ...]]:
        for question in questions:
            self.asked.append(question)
            yield tuple(Likelihood(-len(c), len(c), True) for c in question.candidates)


def asked(text: str, tokenizer: Any, block_size: int, stride: int) -> list[Question]:
    recorder = Recorder()
    perplexity(recorder, tokenizer, text, block_size=block_size, stride=stride)
    return recorder.asked


def context_of(place: int, last: int, block_size: int, stride: int) -> int:
    """Where the context of the token at `place` begins, in a text whose last token is at `last`."""
    if place <= block_size:
        return 0
    steps = math.ceil((place - block_size) / stride)
    return min(block_size + steps * stride, last) - block_size


texts = st.text(min_size=2, max_size=30)
strides = st.integers(1, 12).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b)))


@given(seed=st.integers(0, 10**6), text=texts, sizes=strides, ending=st.booleans())
@torch.no_grad()
def test_each_token_is_predicted_once_from_its_context(
    seed: int, text: str, sizes: tuple[int, int], ending: bool
) -> None:
    torch.manual_seed(seed)
    model = shaken(GPT(SHAPE))
    plain = PlainGPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    block_size, stride = sizes
    tokenizer = Ending() if ending else ByteTokenizer()
    ids = [256] * ending + list(text.encode())
    nats = 0.0
    for place in range(1, len(ids)):
        start = context_of(place, len(ids) - 1, block_size, stride)
        logits = plain(torch.tensor([ids[start:place]]))[0, -1, : tokenizer.vocab_size]
        nats -= logits.log_softmax(0)[ids[place]].item()
    scorer = Scorer(model, vocab_size=tokenizer.vocab_size, batch_size=3)
    found = perplexity(scorer, tokenizer, text, block_size=block_size, stride=stride)
    assert found.nats == pytest.approx(nats, abs=1e-5 * len(ids))
    assert found.tokens == len(ids) - 1
    assert found.unpredicted == (0 if ending else 1)
    assert found.tokens + found.unpredicted == found.bytes == len(text.encode())


@given(text=texts, sizes=strides, ending=st.booleans())
def test_windows_are_those_of_lm_eval(text: str, sizes: tuple[int, int], ending: bool) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    block_size, stride = sizes
    ids = list(text.encode())
    before, tokens = (256, ids) if ending else (ids[0], ids[1:])
    theirs = utils.get_rolling_token_windows(tokens, before, block_size, block_size - stride + 1)
    expected = [
        Question(tuple(given), (tuple(predicted),))
        for given, predicted in map(utils.make_disjoint_window, theirs)
    ]
    assert asked(text, Ending() if ending else ByteTokenizer(), block_size, stride) == expected


def test_windows() -> None:
    assert asked("abcdef", Ending(), 4, 4) == [
        Question((256,), (tuple(b"abcd"),)),
        Question(tuple(b"bcd"), (tuple(b"ef"),)),  # begins earlier, so that it is full
    ]
    assert asked("abcdefgh", ByteTokenizer(), 4, 2) == [
        Question(tuple(b"a"), (tuple(b"bcde"),)),
        Question(tuple(b"cde"), (tuple(b"fg"),)),
        Question(tuple(b"defg"), (tuple(b"h"),)),
    ]


def test_the_end_of_text_stands_before_a_text_once() -> None:
    """Though the tokenizer puts it there too."""
    assert asked("ab", Begun(), 4, 4) == [Question((256,), (tuple(b"ab"),))]


def test_a_text_begins_with_its_beginning_before_an_end() -> None:
    begun = Ending()
    begun.bos = 255  # type: ignore[assignment]
    assert asked("ab", begun, 4, 4) == [Question((255,), (tuple(b"ab"),))]


def test_bytes_and_words_are_the_originals() -> None:
    text, original = "naïve, he said", "naïve , he said\n"
    found = perplexity(Recorder(), Ending(), text, block_size=4, stride=2, original=original)
    assert found == Perplexity(nats=15.0, tokens=15, bytes=17, words=4)
    assert found.per_token == pytest.approx(math.e)
    assert found.per_word == pytest.approx(math.exp(15 / 4))
    assert found.bits_per_token == pytest.approx(1 / math.log(2))
    assert found.bits_per_byte == pytest.approx(15 / 17 / math.log(2))
    own = perplexity(Recorder(), Ending(), text, block_size=4, stride=2)
    assert (own.bytes, own.words) == (15, 3)


def words_of(original: str, line_ends: bool) -> int:
    return perplexity(
        Recorder(), Ending(), "?", block_size=4, stride=2, original=original, line_ends=line_ends
    ).words


def test_the_end_of_a_line_can_be_a_word() -> None:
    lines = "\n = One = \n\nTwo words\n last"
    assert (words_of(lines, False), words_of(lines, True)) == (6, 6 + 4)


def test_words_are_those_of_wikitexts_paper() -> None:
    """Merity et al. 2016, table 1."""
    file = DATA / "wikitext-2" / "test.txt"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    assert words_of(file.read_text(encoding="utf-8"), True) == 245_569


def test_documents_add_up() -> None:
    documents = ["One.", "Two words", "Thr\u00e8e"]
    parts = [perplexity(Recorder(), ByteTokenizer(), t, block_size=4, stride=3) for t in documents]
    assert sum(parts[1:], parts[0]) == Perplexity(16.0, 16, bytes=19, words=4, unpredicted=3)


def test_what_there_is_too_little_or_too_much_of() -> None:
    nothing = Perplexity(0.0, 0, 0, 0)
    for value in (nothing.per_token, nothing.per_word, nothing.bits_per_byte):
        assert math.isnan(value)
    assert Perplexity(1e6, 1000, 1000, 1).per_word == exponential(1e6) == math.inf


def test_the_observer_sees_all_tokens() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        Recorder(), Ending(), "abcdefg", block_size=4, stride=2,
        observer=lambda *numbers: seen.append(numbers),
    )  # fmt: skip
    assert seen == [(4, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("tokenizer", "text", "sizes", "error", "message"),
    [
        (Ending(), "ab", (4, 5), ValueError, "stride must be at most block_size=4, got 5"),
        (Ending(), "ab", (4, 0), ValueError, "stride must be at least 1, got 0"),
        (Ending(), "ab", (4, 2.0), TypeError, "stride must be an int"),
        (Ending(), "", (4, 4), ValueError, "a text must have at least one token, got 0"),
        (ByteTokenizer(), "a", (4, 4), ValueError, "two tokens, as its tokenizer has no end .* 1"),
    ],
)
def test_what_cannot_be_measured(
    tokenizer: Any, text: str, sizes: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        perplexity(Recorder(), tokenizer, text, block_size=sizes[0], stride=sizes[1])
