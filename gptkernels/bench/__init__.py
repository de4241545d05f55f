"""Benchmarks of the fused operators against plain PyTorch.

Each module of `gptkernels.bench.cases` offers

    cases(device, impls, quick) -> Iterator[timing.Case]     what to call, what it must move and do
    rows(device, impls, quick) -> Iterator[dict]             the same, timed

and everything that reports speed (`gptkernels bench`, the demo, `make gpu`, `pytest benchmarks`)
uses these.
"""

from __future__ import annotations

import importlib
from types import ModuleType

OPERATORS = ("layer_norm", "attention", "attention_varlen", "attention_decode", "gelu_mlp")


def suite(op: str) -> ModuleType:
    """The module of an operator's cases. Raises ValueError for an unknown name."""
    if op not in OPERATORS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPERATORS)}")
    return importlib.import_module(f"gptkernels.bench.cases.{op}")
