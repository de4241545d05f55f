"""Calls of `linear_cross_entropy`. Checked are the first rows: the truth of the weight's gradient,
a sum over all rows, needs all logits, so that one is held beside impl="torch" alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gptkernels.core.tuned import TRAINING, Key
from gptkernels.tuning.problems.problem import Cut, Part, Problem, drawing, dtype_of

_ROWS = 64
_IGNORED = -100


def problem(key: Key, sizes: Mapping[str, int]) -> Problem:
    """`sizes` has rows."""
    facts, rows = dict(key.facts), sizes["rows"]
    C, V, reduction = facts["C"], facts["V"], facts["reduction"]
    given, weights, draw = (
        dtype_of(facts["x"]),
        dtype_of(facts["weights"]),
        drawing(facts["device"]),
    )
    x = draw(rows, C + (0 if facts["layout"] == "contiguous" else 64), dtype=given)[:, :C]
    numbers = draw(rows, dtype=torch.float32)
    targets = (numbers.abs() * 1e4).long() % V
    if rows > 1:
        targets[1::5] = _IGNORED
    m, training = min(rows, _ROWS), key.direction == TRAINING
    if not training and reduction != "none":
        # The logits of the others are computed too, but the loss is that of a part.
        targets[m:] = _IGNORED
    tensors: dict[str, Tensor | None] = {
        "x": x,
        "weight": draw(V, C, dtype=weights, scale=2 * C**-0.5),
        "bias": draw(V, dtype=weights) if facts["bias"] else None,
    }
    # Large enough to show in 16 bits.
    options = {
        "label_smoothing": 0.1 if facts["label_smoothing"] else 0.0,
        "z_loss": 1e-2 if facts["z_loss"] else 0.0,
        "softcap": 3.0 if facts["softcap"] else 0.0,
    }
    counted = int((targets != _IGNORED).sum())

    def of_rows(y: Tensor) -> Tensor:
        return y[:m]

    def each(c: Tensor) -> Tensor:
        """The gradient of a sum or a mean, as one of the losses of the first rows."""
        return (c if reduction == "sum" else c / counted).expand(m)

    part = {**tensors, "x": x[:m], "targets": targets[:m]}
    by_rows: dict[str, Cut] = {"x": of_rows} if "x" in facts["gradients"] else {}
    none = {**options, "reduction": "none"}
    if reduction == "none":
        parts = [Part(part, none, of_rows, of_rows, by_rows)]
    elif training:
        parts = [Part(part, none, None, each, by_rows)] if by_rows else []
    else:
        parts = [Part(part, {**options, "reduction": reduction}, _same, _same, {})]
    names = {"x": "x", "w": "weight", "b": "bias"}
    return Problem(
        op="linear_cross_entropy",
        inputs={**tensors, "targets": targets},
        options={**options, "reduction": reduction},
        differentiated=[names[letter] for letter in facts["gradients"]] or ["x"],
        dtype=dtype_of(facts["dtype"]),
        parts=parts,
        training=training,
        autocast=facts["autocast"],
    )


def _same(loss: Tensor) -> Tensor:
    return loss
