"""How good free-form answers are, beside one or several references each.

exact    1 where an answer is its reference, else 0; the mean over all answers
f1       of an answer's words and its reference's: 2 p r / (p + r), where p is the share of the
         answer's words that are in the reference, and r that of the reference's in the answer, each
         word as often as it stands there; the mean over all answers
bleu     of all answers together, by sacrebleu as it is called without options (Papineni et al.,
         "BLEU", 2002; Post, "A Call for Clarity in Reporting BLEU Scores", 2018), 0 to 100

exact and f1 are SQuAD's: both sides lose capitals, ASCII punctuation, the articles a, an and the
and extra white space, and of several references the best counts (Rajpurkar et al., "SQuAD", 2016,
section 6.1). Brown et al., "Language Models are Few-Shot Learners", 2020, section 2.4, score
free-form answers by "F1 similarity score, BLEU, or exact match".

Each metric is a function of sums over the examples, so a resample of them (intervals.py) needs no
answer again.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gptkernels.core.optional import optional

_MISSING = "BLEU needs sacrebleu: pip install 'gptkernels[evaluate]'"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The metrics called `names` of N answers, `predictions`, each with at least one reference:
    exact and f1 in 0...1, bleu in 0...100.

    Raises ValueError for an unknown name, for no answers, for other than N references and for an
    answer without any; ImportError, in one sentence, where sacrebleu is missing.
    """
    tables = {name: table(name, predictions, references) for name in names}
    return {
        name: value(name, [math.fsum(column) for column in zip(*rows, strict=True)], len(rows))
        for name, rows in tables.items()
    }


def check_packages(names: Sequence[str]) -> None:
    """Raise ImportError where a package is missing that one of the metrics needs."""
    if "bleu" in names:
        _bleu()


def per_example(name: str, prediction: str, references: Sequence[str]) -> float:
    """The metric, exact or f1, of one answer: the best over its references. Raises ValueError for
    another name."""
    if name not in _OF_WORDS:
        raise ValueError(f"the metric of an answer must be exact or f1, got {name!r}")
    said, function = _words(prediction), _OF_WORDS[name]
    return max(function(said, _words(reference)) for reference in references)


def table(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[float]]:
    """What each of N answers adds to the sums that `value` takes: N rows. Arguments and errors are
    those of `score`."""
    if name != "bleu" and name not in _OF_WORDS:
        raise ValueError(f"a metric must be exact, f1 or bleu, got {name!r}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"each answer must have references, and there must be one; got {len(predictions)} "
            f"answers and references for {len(references)}"
        )
    for number, those in enumerate(references):
        if not those:
            raise ValueError(f"answer {number} has no reference")
    pairs = zip(predictions, references, strict=True)
    if name == "bleu":
        metric = _bleu()
        return [_matches(metric, said, those) for said, those in pairs]
    return [[per_example(name, said, those)] for said, those in pairs]


def value(name: str, sums: Sequence[float], count: int) -> float:
    """The metric of `count` answers, from the sums of their rows of `table`."""
    if name != "bleu":
        return sums[0] / count
    metric = _bleu()
    length, closest, *matches = map(int, sums)
    order = metric.max_ngram_order
    found = metric.compute_bleu(
        matches[:order],
        matches[order:],
        length,
        closest,
        smooth_method=metric.smooth_method,
        smooth_value=metric.smooth_value,
        effective_order=metric.effective_order,
        max_ngram_order=order,
    )
    return float(found.score)


def bleu_signature(references: Sequence[Sequence[str]]) -> str:
    """How sacrebleu computes BLEU with these references of N answers, and its version, as it asks
    to be reported: "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0". Raises ImportError
    where it is missing."""
    return str(_bleu(references=list(itertools.zip_longest(*references))).get_signature())


def _bleu(**options: Any) -> Any:
    return optional("sacrebleu.metrics", _MISSING).BLEU(**options)


def _matches(metric: Any, prediction: str, references: Sequence[str]) -> list[float]:
    """The answer's length and that of the reference closest to it, in tokens; how many of its 1-,
    2-, 3- and 4-grams are in a reference; and how many it has."""
    found = metric.corpus_score([prediction], [[reference] for reference in references])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _exact(said: list[str], wanted: list[str]) -> float:
    return float(said == wanted)


def _f1(said: list[str], wanted: list[str]) -> float:
    """2 p r / (p + r) with the common words written out; 1 where both sides are empty."""
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if said or wanted else 1.0


_OF_WORDS: dict[str, Callable[[list[str], list[str]], float]] = {"exact": _exact, "f1": _f1}
