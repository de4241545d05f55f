"""Benchmarks of the fused operators against plain PyTorch.

Everything that reports speed (`gptkernels bench`, the demo, `make gpu`, `pytest benchmarks`) times
the same cases; their shapes, bytes and operations are in `gptkernels.bench.cases`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptkernels.bench import timing

OPERATORS = ("layer_norm", "attention", "attention_varlen", "attention_decode", "gelu_mlp")


def cases_of(
    op: str, device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[timing.Case]:
    """What to call for an operator, and what it must move and do; `quick`: of the first shape only.

    Raises ValueError for an unknown operator, at once.
    """
    if op not in OPERATORS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPERATORS)}")
    module = importlib.import_module(f"gptkernels.bench.cases.{op}")
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    shapes = module.GPU_SHAPES if on_gpu else module.CPU_SHAPES
    return (
        case
        for shape in shapes[: 1 if quick else None]
        for dtype in (module.GPU_DTYPES if on_gpu else module.CPU_DTYPES)
        for workload in module.workloads(shape, dtype, device, quick)
        for case in workload.cases(op, impls)
    )


def rows_of(
    op: str, device: torch.device | str, impls: Sequence[str], quick: bool = False
) -> Iterator[dict[str, Any]]:
    """`cases_of`, timed as they come: rows as `timing.rows` describes them.

    Raises ValueError for an unknown operator, at once.
    """
    found = cases_of(op, device, impls, quick)
    return timing.rows(found, device=device, budget_s=0.3 if quick else 1.0)
