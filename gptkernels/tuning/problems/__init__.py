"""Calls to measure: one of each class, at sizes of one's choice."""

from __future__ import annotations

from collections.abc import Mapping

from gptkernels.core.tuned import Key
from gptkernels.tuning.problems import (
    attention,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
)
from gptkernels.tuning.problems.problem import Problem

_MAKERS = {
    "attention": attention.dense,
    "attention_varlen": attention.varlen,
    "attention_decode": attention.decode,
    "gelu_mlp": gelu_mlp.problem,
    "layer_norm": layer_norm.problem,
    "linear_cross_entropy": linear_cross_entropy.problem,
}


def problem(key: Key, sizes: Mapping[str, int]) -> Problem:
    """A call of the class with these sizes, on fresh random inputs. Raises NotImplementedError for
    a class that cannot be made, with the reason."""
    return _MAKERS[key.op](key, sizes)


def work(key: Key, sizes: Mapping[str, int]) -> float:
    """Roughly what a call costs, in operations: for an order among classes."""
    facts = dict(key.facts)
    if key.op == "layer_norm":
        return 32.0 * sizes["rows"] * facts["C"]  # bytes weigh more than operations
    if key.op == "gelu_mlp":
        return 4.0 * sizes["rows"] * facts["C"] * facts["F"]
    if key.op == "linear_cross_entropy":
        return 2.0 * sizes["rows"] * facts["C"] * facts["V"]
    return 4.0 * sizes["Tq"] * sizes["Tk"] * sizes["heads"] * facts["D"]
