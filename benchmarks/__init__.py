"""Benchmarks of the fused operators against plain PyTorch; installed as `gptkernels.benchmarks`.

Each `bench_<op>.py` offers

    cases(device, impls, quick) -> Iterator[timing.Case]     what to call, what it must move and do
    rows(device, impls, quick) -> Iterator[dict]             the same, timed

and everything that reports speed (`gptkernels bench`, the demo, `make gpu`, `pytest benchmarks`)
uses these.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# Operator -> the module that benchmarks it.
_MODULES = {
    "layer_norm": "bench_layer_norm",
    "attention": "bench_attention",
    "attention_varlen": "bench_attention_varlen",
    "attention_decode": "bench_attention_decode",
    "gelu_mlp": "bench_mlp",
}
OPERATORS = tuple(_MODULES)


def suite(op: str) -> ModuleType:
    """The benchmark module of an operator. Raises ValueError for an unknown name."""
    if op not in _MODULES:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPERATORS)}")
    return importlib.import_module(f".{_MODULES[op]}", __package__)
