"""`gptkernels info --explain`: what impl="auto" runs on this machine for a problem given in words,
why, and the measured times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gptkernels.bench.dry_run import Problem
from gptkernels.cli.tune_table import explained
from gptkernels.core import plans
from gptkernels.core.choice import automatic, switched_off
from gptkernels.core.tuned import Entry, bucket, position
from gptkernels.ops.attention import plan as attention
from gptkernels.ops.gelu_mlp import plan as gelu_mlp
from gptkernels.ops.layer_norm import plan as layer_norm
from gptkernels.ops.linear_cross_entropy import plan as linear_cross_entropy
from gptkernels.tuning.explanation import is_of_these_threads, of_entry


def lines(problem: Problem) -> Iterator[str]:
    """What was measured of the classes that such calls belong to: with and without gradients, and
    whatever else tells classes apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [entry for entry in plans.table(device).entries.values() if _fits(entry, problem)]
    yield f'impl="auto" on this machine ({device})'
    if switched_off():
        yield "  torch: GPTKERNELS_IMPL says so"
        return
    if not found:
        yield (
            f"  nothing was measured for it, so the static policy holds, which begins with "
            f"{automatic(device)}; gptkernels tune measures"
        )
    for entry in found:
        at = position(_axes(problem, dict(entry.key.facts)).values())
        end = next(end for end, _ in entry.ranges if at <= end)
        ranges = dict(zip([e for e, _ in entry.ranges], of_entry(entry), strict=False))
        for line in explained(ranges[end]):
            yield f"  {line}"


def _fits(entry: Entry, problem: Problem) -> bool:
    """Whether a call of the problem may be of the class."""
    facts, sizes = dict(entry.key.facts), problem.sizes
    dtype = str(problem.dtype).removeprefix("torch.")
    if entry.key.op != problem.op or facts["dtype"] != dtype:
        return False
    if not is_of_these_threads(entry.key):
        return False
    if problem.op == "layer_norm":
        known = {"C": sizes["cols"]}
        if (facts["residual"] != "none") != bool(sizes["residual"]):
            return False
    elif problem.op == "gelu_mlp":
        known = {"C": sizes["C"], "F": sizes["F"]}
    elif problem.op == "linear_cross_entropy":
        known = {"C": sizes["C"], "V": sizes["V"]}
    else:
        known = {"D": sizes["D"], "group": sizes["H"] // sizes["Hk"]}
        if problem.op != "attention_decode":
            known["causal"] = sizes["right"] == 0
        if (facts["left"] >= 0) != (sizes["left"] >= 0):
            return False
    octaves = {axis: bucket(size) for axis, size in _axes(problem, facts).items()}
    return known.items() <= facts.items() and octaves == dict(entry.key.buckets)


def _axes(problem: Problem, facts: Mapping[str, Any]) -> dict[str, int]:
    sizes, device = problem.sizes, facts["device"]
    if problem.op == "layer_norm":
        return layer_norm.axes(device, sizes["rows"])
    if problem.op == "gelu_mlp":
        return gelu_mlp.axes(device, sizes["M"])
    if problem.op == "linear_cross_entropy":
        return linear_cross_entropy.axes(device, sizes["N"])
    heads = sizes["B"] * sizes["H"]
    return attention.axes(device, facts["threads"], sizes["T"], sizes["Tk"], heads)
