"""The forms of a score_mod that attention's options say: a factor, then softcap, then ALiBi."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

from gptkernels.dropin.flex import expression, masks
from gptkernels.dropin.flex.expression import BATCH, HEAD, KEY, QUERY, SCORE, Name, Term, Unknown
from gptkernels.dropin.flex.masks import EVERYTHING, Mask

KNOWN = (
    "score times a number, then cap * tanh(score / cap), then score + slopes[h] * (kv_idx - q_idx) "
    "or score - slopes[h] * abs(q_idx - kv_idx), and where(mask, score, -inf) of a known mask"
)
_POSITIONS = {QUERY, KEY}


@dataclass(frozen=True)
class Scores:
    """slopes: an expression of b and h, or None, of a bias slopes (kv_idx - q_idx), or, if `even`,
    -slopes abs(q_idx - kv_idx)."""

    factor: float = 1.0
    softcap: float = 0.0
    slopes: Any = None
    even: bool = False
    mask: Mask = EVERYTHING


def known(score: Any) -> Scores:
    """What an expression of the score does. Raises Unknown."""
    found = _known(score)
    if found is None:
        raise Unknown(f"no option of attention is the score {score}; known are {KNOWN}")
    return found


def _known(score: Any) -> Scores | None:
    score = expression.exact(score)
    if score == Name(SCORE):
        return Scores()
    if not isinstance(score, Term) or score.options:
        return None
    match score.operation, score.arguments:
        case "where", (condition, then, hidden) if hidden == -math.inf:
            inner = _known(then)
            return inner and replace(inner, mask=masks.known(condition, inner.mask))
        case ("add" | "sub") as sign, (x, y):
            if sign == "add" and SCORE in expression.names(y):
                x, y = y, x
            inner, bias = _known(x), _bias(y)
            if inner is None or bias is None or inner.slopes is not None:
                return None
            slopes, even = bias
            return replace(
                inner, slopes=_negated(slopes) if (sign == "sub") != even else slopes, even=even
            )
        case "mul", (x, y):
            if _number(x):
                x, y = y, x
            if not _number(y):
                return None
            x = expression.exact(x)
            if isinstance(x, Term) and x.operation == "tanh" and len(x.arguments) == 1:
                return _capped(expression.exact(x.arguments[0]), y)
            return _scaled(x, y)
        case "div", (x, y) if _number(y) and y:
            return _scaled(x, 1 / y)
    return None


def _scaled(score: Any, factor: float) -> Scores | None:
    inner = _known(score)
    # What hides a score has to hide it still.
    if inner is None or inner.softcap or inner.slopes is not None or inner.mask != EVERYTHING:
        return None
    return replace(inner, factor=inner.factor * factor)


def _capped(ratio: Any, cap: float) -> Scores | None:
    """The scores of cap * tanh(ratio)."""
    if not isinstance(ratio, Term) or cap <= 0:
        return None
    match ratio.operation, ratio.arguments:
        case "div", (score, by) if _number(by) and by == cap:
            inner = _scaled(score, 1.0)
        case "mul", ((score, by) | (by, score)) if _number(by) and by == 1 / cap:
            inner = _scaled(score, 1.0)
        case _:
            return None
    return inner and replace(inner, softcap=float(cap))


def _bias(bias: Any) -> tuple[Any, bool] | None:
    """(slopes, even) of a bias slopes (kv_idx - q_idx), or if `even` slopes abs(q_idx - kv_idx)."""
    bias = expression.exact(bias)
    found = expression.position(bias)
    if found is not None:
        return None if found.more or found.query != -found.key else (found.key, False)
    if not isinstance(bias, Term) or bias.options:
        return None
    match bias.operation, bias.arguments:
        case "abs", (x,):
            inner = _bias(x)
            return (abs(inner[0]), True) if inner and _number(inner[0]) else None
        case "neg", (x,):
            inner = _bias(x)
            return inner and (_negated(inner[0]), inner[1])
        case ("mul" | "div") as kind, (x, y):
            if kind == "mul" and not expression.names(x) & _POSITIONS:
                x, y = y, x
            inner = _bias(x)
            if inner is None or not expression.names(y) <= {BATCH, HEAD}:
                return None
            call = operator.mul if kind == "mul" else operator.truediv
            return Term(kind, (inner[0], y), (), call), inner[1]
    return None


def _negated(slopes: Any) -> Any:
    return Term("neg", (slopes,), (), operator.neg)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
