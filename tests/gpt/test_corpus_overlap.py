"""The overlap of evaluations with a corpus, beside sets of whole 8-grams."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.corpus import ngrams as ngrams_module
from gptkernels.gpt.corpus.documents import Part
from gptkernels.gpt.corpus.evaluations import evaluation_texts
from gptkernels.gpt.corpus.ngrams import ngrams, ngrams_of, words_of
from gptkernels.gpt.corpus.overlap import Overlap, _size, overlap

pytest.importorskip("rbloom")

WORDS = st.lists(st.sampled_from("abc"), max_size=40).map(" ".join)


def grams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]


def parts(texts: list[str]) -> Iterator[Part]:
    return map(Part, texts)


def by_sets(texts: list[str], evaluation: list[str]) -> tuple[int, int]:
    there = {gram for text in texts for gram in grams(text)}
    own = [gram for text in evaluation for gram in grams(text)]
    return len(own), sum(gram in there for gram in own)


@given(
    st.lists(WORDS, max_size=5),
    st.lists(WORDS, min_size=1, max_size=3),
    st.sampled_from([8, 100, 500, 1 << 20]),
)
def test_overlap_is_that_of_sets(texts: list[str], evaluation: list[str], memory: int) -> None:
    count, found = by_sets(texts, evaluation)
    words = sum(len(text.split()) for text in texts)
    if not count:
        with pytest.raises(ValueError, match="e has no text of at least 8 words"):
            overlap(parts(texts), words, {"e": evaluation}, memory=memory)
        return
    (result,) = overlap(parts(texts), words, {"e": evaluation}, memory=memory)
    assert (result.ngrams, result.found) == (count, found)
    assert result.share == found / count


def test_what_an_overlap_says() -> None:
    training = ["Zero one two three, FOUR five-six seven! Eight nine", "a b c d e f g h"]
    evaluation = [
        "x y one two three four five six seven eight nine z",
        "a b c d e f g h",
        "e f g h a b c d",  # of two texts
        "too short",
    ]
    (result,) = overlap(parts(training), 18, {"test": evaluation})
    longest = "one two three four five six seven eight nine"
    assert result == Overlap("test", 5 + 1 + 1, 2 + 1, 9, longest)
    (nothing,) = overlap([], 0, {"test": evaluation})
    assert nothing == Overlap("test", 7, 0, 0, "")
    assert nothing.share == 0


@pytest.mark.parametrize("memory", [64, 1 << 10, 1 << 20])
def test_every_part_of_the_corpus_is_looked_in(memory: int) -> None:
    texts = [" ".join(f"w{i}x{j}" for j in range(30)) for i in range(20)]
    evaluation = [*texts, " ".join(f"w{i}" for i in range(30))]
    (result,) = overlap(parts(texts), 600, {"e": evaluation}, memory=memory)
    assert (result.ngrams, result.found) == (21 * 23, 20 * 23)
    assert result.longest == 30
    assert result.example.startswith("w0x0 w0x1 ")  # the first of equal length


def test_each_evaluation_is_for_itself() -> None:
    one, two = "a b c d e f g h", "a b c d e f g h i j"
    results = overlap(
        parts([two]), 10, {"one": [one], "two": [one, two], "three": ["h g f e d c b a"]}
    )
    assert [(r.name, r.ngrams, r.found) for r in results] == [
        ("one", 1, 1),
        ("two", 4, 4),
        ("three", 1, 0),
    ]


def test_words_are_lower_cased_letters_and_digits() -> None:
    assert list(words_of("It's snake_case, ÉTÉ 3.5%\n語\u00a0x")) == [
        *("it", "s", "snake", "case", "été", "3", "5", "語", "x")
    ]


@given(st.lists(st.sampled_from("abcd"), max_size=60), st.integers(1, 20))
def test_ngrams_do_not_depend_on_pieces(words: list[str], block: int) -> None:
    whole = ngrams(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams_module, "_BLOCK", block)
        for texts in (
            [Part(" ".join(words))],
            [Part(f" {word}", i > 0) for i, word in enumerate(words)],
        ):
            assert torch.equal(torch.cat([*ngrams_of(texts), whole[:0]]), whole)
    different = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    assert len(set(whole.tolist())) == len(different)


def test_ngrams_are_the_same_in_every_process() -> None:
    assert ngrams(["to", "be", "or", "not", "to", "be", "that", "is"]).tolist() == [
        -1524976023298539223
    ]


@pytest.mark.parametrize("memory", [1 << 12, 1 << 16, 1 << 24])
def test_all_filters_together_keep_to_the_rate(memory: int) -> None:
    draw = random.Random(memory)
    texts = [" ".join(str(draw.getrandbits(60)) for _ in range(500)) for _ in range(40)]
    other = [" ".join(str(draw.getrandbits(60)) for _ in range(10_000))]
    (result,) = overlap(parts(texts), 20_000, {"other": other}, memory=memory, false_positives=0.05)
    expected = 0.05 * result.ngrams
    assert result.found < expected + 5 * expected**0.5
    if memory == 1 << 12:  # 20,000 8-grams do not fit into 4 KiB
        assert result.found > 0


@given(st.integers(0, 10**12), st.integers(1 << 10, 1 << 34))
def test_a_filter_keeps_to_its_memory_and_all_to_the_rate(words: int, memory: int) -> None:
    size, rate = _size(words, memory, 1e-8)
    bits = 1.4427 * size * -torch.tensor(rate, dtype=torch.float64).log2().item()
    assert bits <= 8 * memory * 1.001
    filters = max(1, -(-words // size))
    assert filters * rate <= 1e-8 * 1.001
    # No filter has more room than there are words, and none is smaller than it has to be.
    assert size <= max(1, words)
    assert size == max(1, words) or bits > 8 * memory * 0.9


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory must be at least"):
        overlap(parts(["a"]), 10**9, {"e": ["a b c d e f g h"]}, memory=1)


def test_the_corpus_is_read_once() -> None:
    def once() -> Iterator[Part]:
        for text in ("a b c d e f g h", "b c d e f g h i"):
            seen.append(text)
            yield Part(text)

    seen: list[str] = []
    overlap(once(), 16, {"e": ["a b c d e f g h"]}, memory=64)
    assert len(seen) == 2


def test_texts_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.tsv").write_text("1\tthree\n")
    (tmp_path / "c.txt").write_text("four " * 300_000)  # more than a record
    assert evaluation_texts(tmp_path / "a.jsonl") == ["one", "two"]
    assert evaluation_texts(tmp_path / "b.tsv") == ["1\tthree\n"]
    assert evaluation_texts(tmp_path / "c.txt") == ["four " * 300_000]


def test_an_evaluation_that_cannot_be_read_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text"\n')
    (tmp_path / "b.tsv").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.html").write_bytes(b"\0" * 99)
    for name, message in (
        ("a.jsonl", r"evaluations: .*a\.jsonl:2 is not JSON"),
        ("b.tsv", r"b\.tsv is not UTF-8"),
        ("c.txt", r"evaluations: .*c\.txt holds no page"),
        ("d.html", r"evaluations: .*d\.html is in no encoding that can be told"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist"):
        evaluation_texts(tmp_path / "gone.txt")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rbloom", None)
    with pytest.raises(ImportError, match=r"pip install 'gptkernels\[data\]'"):
        overlap([], 0, {"e": ["a b c d e f g h"]})
