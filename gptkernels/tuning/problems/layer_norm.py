"""Calls of `layer_norm`. Checked are the first rows; all of them for the gradients of weight and
bias, which are sums over rows, where that takes little."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gptkernels.core.tuned import TRAINING, Key
from gptkernels.tuning.problems.problem import Cut, Part, Problem, drawing, dtype_of, whole

_CHECKED_NUMBERS = 1 << 23
_FIRST_ROWS = 256


def problem(key: Key, sizes: Mapping[str, int]) -> Problem:
    """`sizes` has rows. A dropout's mask depends on numbers of elements, which first rows keep."""
    facts, rows = dict(key.facts), sizes["rows"]
    C, dtype, draw = facts["C"], dtype_of(facts["dtype"]), drawing(facts["device"])
    x = draw(rows, C + (0 if facts["layout"] == "contiguous" else 64), dtype=dtype)[:, :C]
    inputs: dict[str, Tensor | None] = {"x": x, "weight": None}
    if facts["weights"] != "none":
        inputs["weight"] = draw(C, dtype=dtype_of(facts["weights"]))
    if facts["bias"]:
        like = facts["dtype"] if facts["weights"] == "none" else facts["weights"]
        inputs["bias"] = draw(C, dtype=dtype_of(like))
    if facts["residual"] != "none":
        inputs["residual"] = draw(rows, C, dtype=dtype_of(facts["residual"]))
    options = {
        "dropout_p": 0.1 if facts["dropout"] else 0.0,
        "prenorm": facts["prenorm"],
        "residual_in_fp32": facts["wide"],
    }
    differentiated = [name for name, tensor in inputs.items() if tensor is not None]
    rowwise = [name for name in ("x", "residual") if name in inputs]
    training = key.direction == TRAINING
    first = min(rows, _FIRST_ROWS)

    def cut(y: Tensor) -> Tensor:
        return y[:first]

    whole_inputs = dict(inputs)
    if whole_inputs["weight"] is None:
        whole_inputs["weight"] = x.new_ones(C)  # the formula wants one
    part = {
        name: cut(t) if name in rowwise and t is not None else t for name, t in whole_inputs.items()
    }
    parts = [Part(part, options, cut, cut, dict.fromkeys(rowwise, cut))]
    of_weights: dict[str, Cut] = {name: whole for name in differentiated if name not in rowwise}
    if training and of_weights and rows * C <= _CHECKED_NUMBERS:
        parts.append(Part(whole_inputs, options, None, whole, of_weights))
    return Problem(
        op="layer_norm",
        inputs=inputs,
        options=options,
        differentiated=differentiated,
        dtype=dtype,
        parts=parts,
        training=training,
        autocast=facts["autocast"],
    )
