"""Exact match, F1 and BLEU of free-form answers, and how far they would move."""

from __future__ import annotations

import itertools
import math
import random
import string
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.gpt.evaluation import intervals, metrics

sacrebleu = pytest.importorskip("sacrebleu", reason="needs the package sacrebleu")
np = pytest.importorskip("numpy", reason="needs the package numpy")
pytest.importorskip("scipy.stats", reason="needs the package scipy")

VOCABULARY = ["the", "a", "An", "dog", "dogs", "ran", "Fast", "7", ",", ".", "it's"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=9)
SENTENCES = WORDS.map(" ".join)
ANSWERS = st.lists(
    st.tuples(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3)), min_size=1, max_size=6
)


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel  tower", 1, 1),
        ("It's a U.S. dog.", "its us dog", 1, 1),
        ("another theory", "other ory", 0, 0),  # articles are whole words
        ("in Paris, France", "Paris", 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("dog dog dog cat", "dog dog bird", 0, 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("", "the", 1, 1),  # both are empty
        ("a", "dog", 0, 0),
        ("Café\n\u2014 olé", "café \u2014 olé", 1, 1),
    ],
)
def test_answers_worked_out_by_hand(said: str, wanted: str, exact: float, f1: float) -> None:
    for one, other in ((said, wanted), (wanted, said)):
        assert metrics.per_example("exact", one, [other]) == exact
        assert metrics.per_example("f1", one, [other]) == pytest.approx(f1)


def test_the_best_reference_counts() -> None:
    assert metrics.per_example("f1", "red dog", ["blue", "dog", "cat"]) == pytest.approx(2 / 3)
    assert metrics.per_example("exact", "red dog", ["blue", "red dog"]) == 1


def words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def plain_f1(said: str, wanted: str) -> float:
    """By taking common words away, one at a time."""
    left, common = words(wanted), 0
    for word in words(said):
        if word in left:
            left.remove(word)
            common += 1
    if not words(said) or not words(wanted) or not common:
        return float(words(said) == words(wanted))
    precision, recall = common / len(words(said)), common / len(words(wanted))
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=60)
@given(answers=ANSWERS)
def test_means_and_bleu_of_a_corpus(answers: list[tuple[str, list[str]]]) -> None:
    predictions, references = (list(column) for column in zip(*answers, strict=True))
    found = metrics.score(["bleu", "f1", "exact"], predictions, references)
    assert list(found) == ["bleu", "f1", "exact"]
    best = [max(plain_f1(said, one) for one in those) for said, those in answers]
    assert found["f1"] == pytest.approx(sum(best) / len(answers))
    right = [any(words(said) == words(one) for one in those) for said, those in answers]
    assert found["exact"] == sum(right) / len(answers)
    streams = list(itertools.zip_longest(*references))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)


def test_bleus_signature() -> None:
    signature = f"case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert metrics.bleu_signature([["a", "b"], ["c", "d"]]) == f"nrefs:2|{signature}"
    assert metrics.bleu_signature([["a", "b"], ["c"]]) == f"nrefs:var|{signature}"


# Intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    """With many examples the mean is normal: 1.96 standard errors on either side."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    low, high = intervals.of_mean(values.tolist(), 1)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_an_interval_is_what_resampled_answers_score() -> None:
    """Answers drawn and scored again as a whole, BLEU's too."""
    generator = random.Random(0)
    vocabulary = ["one", "two", "three", "four", "five", "six"]
    references = [[" ".join(generator.choices(vocabulary, k=12))] for _ in range(40)]
    predictions = [
        " ".join(w if generator.random() < 0.8 else "seven" for w in those[0].split())
        for those in references
    ]
    for name in ("f1", "bleu"):
        scores = []
        for _ in range(200):
            places = generator.choices(range(40), k=40)
            drawn = [[column[i] for i in places] for column in (predictions, references)]
            scores.append(metrics.score([name], *drawn)[name])
        low, high = intervals.of_metric(name, predictions, references, 1)
        theirs = np.percentile(scores, [2.5, 97.5])
        assert [low, high] == pytest.approx(theirs, abs=0.2 * (theirs[1] - theirs[0]))


@pytest.mark.filterwarnings("error")
def test_examples_that_agree_give_a_point() -> None:
    for values in ([0.25] * 9, [0.25]):
        assert intervals.of_mean(values, 0) == (0.25, 0.25)
    same = ["one dog ran to the house"] * 5
    assert intervals.of_metric("exact", same, [[said] for said in same], 0) == (1, 1)
    assert intervals.of_metric("bleu", same, [[said] for said in same], 0) == pytest.approx(
        (100, 100)
    )


def test_a_seed_gives_the_same_interval_again() -> None:
    values = [math.sin(i) for i in range(20)]
    assert intervals.of_mean(values, 7) == intervals.of_mean(values, 7)
    assert intervals.of_mean(values, 7) != intervals.of_mean(values, 8)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (metrics.score, (["rouge"], ["a"], [["a"]]), "a metric must be exact, f1 or bleu, got 'r"),
        (metrics.score, (["f1"], [], []), "there must be one; got 0 answers and references for 0"),
        (metrics.score, (["f1"], ["a"], [["a"], ["b"]]), "got 1 answers and references for 2"),
        (metrics.score, (["bleu"], ["a", "b"], [["a"], []]), "answer 1 has no reference"),
        (metrics.per_example, ("bleu", "a", ["a"]), "must be exact or f1, got 'bleu'"),
        (intervals.of_mean, ([], 0), "a mean must be of at least one value, got none"),
    ],
)
def test_bad_input(call: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sacrebleu.metrics", "scipy.stats"):
        monkeypatch.setitem(sys.modules, module, None)
    missing = r"pip install 'gptkernels\[evaluate\]'"
    metrics.check_packages(["exact", "f1"])
    for check in (lambda: metrics.check_packages(["f1", "bleu"]), intervals.check_packages):
        with pytest.raises(ImportError, match=missing):
            check()
    with pytest.raises(ImportError, match=missing):
        intervals.of_mean([1.0, 2.0], 0)
    assert metrics.score(["f1"], ["a dog"], [["dog"]]) == {"f1": 1}
