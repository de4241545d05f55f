"""How good predictions are, by scikit-learn and scipy.

accuracy            the share that is right
f1                  of the second class where there are two, else the mean over the classes
matthews            Matthews' correlation coefficient, 0 for predictions of one class
pearson, spearman   correlations of numbers; 0 where all predictions are equal
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from gptkernels.core.optional import optional

_MISSING = "metrics need scikit-learn and scipy: pip install 'gptkernels[finetune]'"


def score(
    names: Sequence[str], targets: Sequence[float], predictions: Sequence[float], classes: int = 0
) -> dict[str, float]:
    """The metrics called `names`, of N targets and N predictions: indices of `classes` (of two or
    more; 0 for choices), or numbers.

    Raises ImportError, in one sentence, where scikit-learn or scipy is missing.
    """
    return {name: _one(name, targets, predictions, classes) for name in names}


def check_packages() -> None:
    """Raise ImportError where one of the packages is missing."""
    optional("sklearn.metrics", _MISSING)
    optional("scipy.stats", _MISSING)


def _one(name: str, targets: Sequence[float], predictions: Sequence[float], classes: int) -> float:
    if name in ("pearson", "spearman"):
        return _correlation(name, targets, predictions)
    metrics: Any = optional("sklearn.metrics", _MISSING)
    match name:
        case "accuracy":
            return float(metrics.accuracy_score(targets, predictions))
        case "f1":
            average = "binary" if classes == 2 else "macro"
            known = list(range(classes)) if classes > 2 else None
            return float(
                metrics.f1_score(
                    targets, predictions, average=average, labels=known, zero_division=0.0
                )
            )
        case _:
            with warnings.catch_warnings():  # of a single class, where it is 0
                warnings.simplefilter("ignore")
                return float(metrics.matthews_corrcoef(targets, predictions))


def _correlation(name: str, targets: Sequence[float], predictions: Sequence[float]) -> float:
    stats: Any = optional("scipy.stats", _MISSING)
    if len(set(predictions)) < 2 or len(set(targets)) < 2:
        return 0.0
    function = stats.pearsonr if name == "pearson" else stats.spearmanr
    return float(function(targets, predictions).statistic)
