"""How far a result would move with other examples: 95% bootstrap intervals.

The N examples are drawn N times with replacement, and that again and again; the interval is what
lies between the 2.5th and the 97.5th percentile of the results (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, chapter 13), by scipy. The percentile interval is taken, not
the corrected BCa: that needs every result without one example too, N of them, and is NaN where all
examples have the same value. Bounds of a function that only grows, such as exp, are the function of
the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gptkernels.core.optional import optional
from gptkernels.gpt.evaluation import metrics

_MISSING = "bootstrap intervals need scipy: pip install 'gptkernels[evaluate]'"
_RESAMPLES = 2000
# So many resamples are held at a time, as places of examples.
_BATCH = 100

Interval = tuple[float, float]
"""Its lower and its upper bound."""


def check_packages() -> None:
    """Raise ImportError where scipy is missing."""
    optional("scipy.stats", _MISSING)


def of_mean(values: Sequence[float], seed: int) -> Interval:
    """The interval of the mean of the values; `seed` gives the same one again. Raises ValueError
    where there are none, and ImportError where scipy is missing."""
    if not values:
        raise ValueError("a mean must be of at least one value, got none")
    rows = _rows([[value] for value in values])
    return _interval(rows, lambda sums: sums[0] / len(rows), seed)


def of_metric(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], seed: int
) -> Interval:
    """The interval of a metric of N answers. Arguments and errors are those of `metrics.score`, and
    of `of_mean`."""
    rows = _rows(metrics.table(name, predictions, references))
    return _interval(rows, lambda sums: metrics.value(name, sums, len(rows)), seed)


def _rows(table: list[list[float]]) -> Any:
    return optional("numpy", _MISSING).array(table, dtype=float)


def _interval(rows: Any, of_sums: Callable[[Sequence[float]], float], seed: int) -> Interval:
    """That of `of_sums`, which the sums over the rows (N, S) of examples are given to."""
    if len(rows) == 1:  # all resamples are the same, and scipy wants two examples
        alone = float(of_sums(rows[0]))
        return alone, alone
    found = optional("scipy.stats", _MISSING).bootstrap(
        (range(len(rows)),),
        lambda places: of_sums(rows[places].sum(axis=0)),
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=False,
        method="percentile",
        rng=seed,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
