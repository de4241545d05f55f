"""Numbers of a report as short words."""

from __future__ import annotations

from collections.abc import Sequence

from gptkernels.bench import measure, text
from gptkernels.bench.results import Row

NONE = "–"


def size(value: float | None) -> str:
    """Bytes with a fitting unit."""
    return NONE if value is None else text.size(value)


def rate(row: Row) -> str:
    """How much of what binds a row it does in a second; tokens for a whole model."""
    return text.rate(row) or NONE


def efficiency(row: Row) -> str:
    """The share of the ceiling that a row reaches, or why none is given. Never above 100%."""
    share = row.get("efficiency")
    if share is None:
        return row.get("no_efficiency") or NONE
    return f"{100 * share:.0f}%" if share <= 1 else "above the measured ceiling"


def spread(row: Row) -> str:
    """Half of the interval that holds the true median, as a share of the median."""
    return NONE if row.get("low_s") is None else f"±{100 * measure.spread(row):.1f}%"


def times(ratio: float | None) -> str:
    """A ratio of two times."""
    if ratio is None:
        return NONE
    return f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×"


def error(row: Row) -> str:
    """The largest error beside its limit; that nothing checked the result, where nothing did."""
    if row.get("error") is None or row.get("limit") is None:
        return "unchecked"
    return f"{row['error']:.1e} of {row['limit']:.1e}".replace("e-0", "e-")


def count(number: int, noun: str) -> str:
    """A number of things: "1 case", "3 cases"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
