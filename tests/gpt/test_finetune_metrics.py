"""Metrics, beside numbers that are worked out by hand."""

from __future__ import annotations

import math
import sys

import pytest

from gptkernels.gpt.finetuning.metrics import check_packages, score

pytest.importorskip("sklearn", reason="needs the package scikit-learn")
pytest.importorskip("scipy", reason="needs the package scipy")

# 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
RIGHT, SAID = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0]


def test_metrics_of_two_classes() -> None:
    found = score(("accuracy", "f1", "matthews"), RIGHT, SAID, 2)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))
    flipped = score(("f1",), [1 - r for r in RIGHT], [1 - s for s in SAID], 2)
    assert flipped["f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))  # of the second class alone


def test_f1_of_more_classes_is_the_mean_over_all_of_them() -> None:
    """Also over the one that nobody named: its F1 is 0."""
    found = score(("f1", "accuracy"), [0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert found["accuracy"] == 0.75


def test_correlations() -> None:
    right, said = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    found = score(("pearson", "spearman"), right, said)
    assert found["pearson"] == pytest.approx(13 / math.sqrt(5 * 50))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.filterwarnings("error")
def test_one_answer_to_everything_is_worth_nothing() -> None:
    assert score(("f1", "matthews"), RIGHT, [0] * 8, 2) == {"f1": 0, "matthews": 0}
    assert score(("pearson", "spearman"), [1, 2, 3], [2, 2, 2]) == {"pearson": 0, "spearman": 0}
    assert score(("pearson", "spearman"), [2, 2, 2], [1, 2, 3]) == {"pearson": 0, "spearman": 0}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"scikit-learn and scipy: pip install 'gptkernels\[fine"):
        check_packages()
    with pytest.raises(ImportError, match=r"pip install 'gptkernels\[finetune\]'"):
        score(("accuracy",), [1], [1], 2)
