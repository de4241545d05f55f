"""Which ways are tried for a class of calls, on the device that it is of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptkernels.core import cpu
from gptkernels.core.choice import unavailable
from gptkernels.core.tuned import COMPILED, TRAINING, Key
from gptkernels.ops.attention import limits
from gptkernels.tuning.problems.problem import dtype_of

# Instruction sets below the highest: a lower one may have a higher clock, or no tiles to set up.
_LOWER_SETS = ("v3", "v4_bf16")
# Their time is that of products, which are PyTorch's whatever the kernels' instruction set is.
_PYTORCHS_PRODUCTS = ("gelu_mlp", "linear_cross_entropy")


@dataclass(frozen=True)
class Ways:
    """whole: functions that are no implementation of ours. forward, backward: implementations of
    ours for each pass of a training call; `forward` alone for a call without gradients."""

    whole: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)


def of(key: Key, inputs: Mapping[str, Any]) -> Ways:
    """The ways for a class, of which `inputs` are a call's tensors by name."""
    facts = dict(key.facts)
    training = key.direction == TRAINING
    if key.mode == COMPILED:
        # A graph takes an implementation by its name; "torch" becomes a part of it.
        named = ["torch", *_named(key.op, facts)]
        return Ways(forward=named, backward=named if training else [])
    whole = _whole(key, facts)
    if facts["device"] == "cuda":
        from gptkernels.tuning import gpu_ways

        found = gpu_ways.ways(key, inputs)
        return Ways(whole, found.forward, found.backward)
    ours = ["torch", *_named(key.op, facts)]
    if "cpu" in ours:
        ours += [f"cpu:{isa}" for isa in _LOWER_SETS if _is_lower(isa, facts, key.op)]
    return Ways(whole, ours, ours if training else [])


def _named(op: str, facts: Mapping[str, Any]) -> list[str]:
    """Kernels that run here, by their implementation's name."""
    device, dtype, lacking = facts["device"], dtype_of(facts["dtype"]), limits.of_class(facts, op)
    names = ["cpu"] if device == "cpu" else ["cuda", "triton"]
    return [
        name for name in names if name not in lacking and unavailable(name, device, dtype) is None
    ]


def _is_lower(isa: str, facts: Mapping[str, Any], op: str) -> bool:
    """Whether kernels for an instruction set are others than those that run, and here."""
    here = cpu.instruction_sets()
    if isa not in here or here.index(isa) >= here.index(cpu.instruction_set()):
        return False
    # AMX has its own products of attention in bf16; all else is AVX-512's.
    tiles = op in ("attention", "attention_varlen") and facts["dtype"] == "bfloat16"
    return tiles if isa == "v4_bf16" else op not in _PYTORCHS_PRODUCTS


def _whole(key: Key, facts: Mapping[str, Any]) -> list[str]:
    if key.op in ("attention_varlen", "attention_decode"):
        return []  # PyTorch has no function of the same meaning
    found: list[str] = importlib.import_module(f"gptkernels.ops.{key.op}.whole").takes(facts)
    return found
