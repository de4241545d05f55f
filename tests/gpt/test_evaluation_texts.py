"""The perplexity of files: what counts in them, and what their figures are in JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from begun import Begun
from models import shaken

from gptkernels import GPT, GPTConfig
from gptkernels.gpt.evaluation.config import RunConfig, TextConfig
from gptkernels.gpt.evaluation.perplexity import Perplexity
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.texts import Text, evaluate_texts, figures, total
from gptkernels.gpt.tokenizer import ByteTokenizer

WIKITEXT = TextConfig(stride=16, detokenizer="wikitext")


class Lowering(Begun):
    """Lower-cases a text, as GPT-1's tokenizer does."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return super().encode(text.lower(), special=special)


def subject_of(tokenizer: ByteTokenizer) -> Subject:
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16)
    return Subject(shaken(GPT(shape), 0.3).eval(), tokenizer, RunConfig(device="cpu"))


def written(folder: Path, text: str, name: str = "a.txt") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_texts_add_up(tmp_path: Path) -> None:
    pages = ["It rains . " * 30, " The sun @-@ warmed stone . \n" * 12]
    files = [written(tmp_path, page, f"{place}.txt") for place, page in enumerate(pages)]
    subject, seen = subject_of(ByteTokenizer()), list[float]()
    found = evaluate_texts(
        subject, files, config=TextConfig(stride=16), observer=lambda _, done: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)
    nats = sum(text.perplexity.nats for text in found)
    assert total(found).nats == pytest.approx(nats)
    assert total(found).bytes == sum(map(len, pages))
    plain = evaluate_texts(subject, files, config=WIKITEXT)
    # Fewer tokens are predicted; the bytes and words that count stay the data set's.
    assert total(plain).tokens < total(found).tokens
    assert total(plain).bytes == total(found).bytes
    # Only there is a line a data set's, whose end is a word.
    assert total(found).words == 3 * 30 + 6 * 12
    assert [text.perplexity.words for text in plain] == [3 * 30, 7 * 12]


@pytest.mark.parametrize(
    ("tokenizer", "text", "changed"),
    [
        (Lowering(), " It rains @-@ again . \n", True),
        (Lowering(), " it rains @-@ again . \n", False),
        (Begun(), " It rains @-@ again . \n", False),
        (ByteTokenizer(), " It r\u00e4ins @-@ again . \n", False),
    ],
)
@pytest.mark.parametrize("detokenizer", [None, "wikitext"])
def test_a_text_that_the_tokenizer_changes_is_marked(
    tokenizer: ByteTokenizer, text: str, changed: bool, detokenizer: str | None, tmp_path: Path
) -> None:
    """What a detokeniser changes is no fault of the tokenizer."""
    config = TextConfig(detokenizer=detokenizer)
    (found,) = evaluate_texts(subject_of(tokenizer), [written(tmp_path, text)], config=config)
    assert found.changed is found.as_dict()["changed"] is changed


def test_figures_are_numbers_of_json() -> None:
    """Which has no infinity and no NaN."""

    def without(constant: str) -> Any:
        pytest.fail(f"{constant} is not JSON")

    nothing, broken = Perplexity(0.0, 0, 0, 0), Perplexity(math.inf, 9, 9, 9)
    endless = Text(Path("a"), Perplexity(1e6, 9, 9, 1), 0, False).as_dict()
    for found in (figures(nothing), figures(broken), endless):
        assert json.loads(json.dumps(found), parse_constant=without) == found
        assert found["perplexity_per_word"] is None
    assert endless["bits_per_byte"] == pytest.approx(1e6 / 9 / math.log(2))
