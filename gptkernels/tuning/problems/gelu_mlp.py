"""Calls of `gelu_mlp`. Checked are the first rows, and, for the gradients of the weights, which are
sums over all rows, the first of the inner units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gptkernels.core.tuned import TRAINING, Key
from gptkernels.tuning.problems.problem import Cut, Part, Problem, drawing, dtype_of, whole

_ROWS, _UNITS = 64, 64


def problem(key: Key, sizes: Mapping[str, int]) -> Problem:
    """`sizes` has rows."""
    facts, rows = dict(key.facts), sizes["rows"]
    C, F = facts["C"], facts["F"]
    given, weights, draw = (
        dtype_of(facts["x"]),
        dtype_of(facts["weights"]),
        drawing(facts["device"]),
    )

    def matrix(N: int, K: int) -> Tensor:
        if facts["transposed"]:
            return draw(K, N, dtype=weights, scale=K**-0.5).t()
        return draw(N, K, dtype=weights, scale=K**-0.5)

    x = draw(rows, C + (0 if facts["layout"] == "contiguous" else 64), dtype=given)[:, :C]
    inputs: dict[str, Tensor | None] = {
        "x": x,
        "w1": matrix(F, C),
        "b1": draw(F, dtype=weights) if facts["b1"] else None,
        "w2": matrix(C, F),
        "b2": draw(C, dtype=weights) if facts["b2"] else None,
    }
    formula = {"approximate": facts["approximate"]}
    differentiated = [name for name, tensor in inputs.items() if tensor is not None]
    m, n = min(rows, _ROWS), min(F, _UNITS)

    def of_rows(y: Tensor) -> Tensor:
        return y[:m]

    def of_units(w: Tensor) -> Tensor:
        return w[:n]

    def of_columns(w: Tensor) -> Tensor:
        return w[:, :n]

    units = {"w1": of_units, "b1": of_units, "w2": of_columns}
    some = {
        name: cut(t) if (t := inputs[name]) is not None else None for name, cut in units.items()
    }
    by_units: dict[str, Cut] = {name: cut for name, cut in units.items() if name in differentiated}
    if "b2" in differentiated:
        by_units["b2"] = whole
    return Problem(
        op="gelu_mlp",
        inputs=inputs,
        options={**formula, "recompute": facts["recompute"]},
        differentiated=differentiated,
        dtype=dtype_of(facts["dtype"]),
        parts=[
            Part({**inputs, "x": x[:m]}, formula, of_rows, of_rows, {"x": of_rows}),
            Part({**inputs, **some}, formula, None, whole, by_units),
        ][: 2 if key.direction == TRAINING else 1],
        training=key.direction == TRAINING,
        autocast=facts["autocast"],
    )
