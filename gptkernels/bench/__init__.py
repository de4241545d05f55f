"""Benchmarks of the fused operators and whole models, beside plain PyTorch and the best others.

Everything that reports speed (`gptkernels bench`, the demo, `make gpu`, `pytest benchmarks`) times
the same cases; their shapes, bytes and operations are in `gptkernels.bench.cases`.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.bench import measure
from gptkernels.bench.case import Case
from gptkernels.bench.results import Row
from gptkernels.core.names import check_name

OPERATORS = (
    "layer_norm",
    "attention",
    "attention_varlen",
    "attention_decode",
    "gelu_mlp",
    "linear_cross_entropy",
)
MODELS = ("gpt_training", "gpt_generate", "gpt_first_token")
LEVELS = ("quick", "default", "full")
# Seconds of one comparison, by level.
BUDGET_S = {"quick": 0.3, "default": 1.0, "full": 0.5}


@dataclass(frozen=True)
class Step:
    """One shape and dtype of an operator or of a model: the unit in which a run proceeds."""

    op: str
    shape: Any
    dtype: torch.dtype

    def cases(self, device: torch.device, impls: Sequence[str]) -> Iterator[Case]:
        """Each direction. Tensors are made when the first case is asked for."""
        yield from _module(self.op).cases(self.shape, self.dtype, device, impls)


def steps(
    ops: Sequence[str],
    device: torch.device | str,
    level: str = "default",
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    shapes: Sequence[str] = (),
) -> list[Step]:
    """What a run does, the most telling first: the first shape of each op, then the second...

    Args:
        ops: names of OPERATORS and MODELS.
        device: where it runs; shapes depend on it.
        level: "quick", "default" or "full".
        dtypes: only these; None takes those of each op.
        shapes: only shapes that hold one of these texts, such as "T1024"; none: all.

    Raises:
        ValueError: an op or the level is unknown, or no shape holds one of the texts.
    """
    for op in ops:
        check_name("op", op, OPERATORS + MODELS)
    check_name("level", level, LEVELS)
    kind = torch.device(device).type
    columns = [
        [
            Step(op, shape, dtype)
            for shape in _module(op).shapes(kind, level)
            if not shapes or any(text in str(shape) for text in shapes)
            for dtype in (_module(op).dtypes(kind, level) if dtypes is None else dtypes)
        ]
        for op in ops
    ]
    for text in shapes:
        if not any(text in str(step.shape) for column in columns for step in column):
            raise ValueError(
                f"no shape of {', '.join(ops)} holds {text!r} (level {level}); there are "
                f"{_some([_module(op).shapes(kind, level) for op in ops])}"
            )
    turns = itertools.zip_longest(*columns)
    return [step for turn in turns for step in turn if step is not None]


def _some(shapes: Sequence[Sequence[Any]], most: int = 12) -> str:
    """Names of some of an operator's shapes, and of each other's in turn."""
    turns = itertools.zip_longest(*shapes)
    names = list(dict.fromkeys(str(each) for turn in turns for each in turn if each is not None))
    return "; ".join(names[:most]) + (" ..." if len(names) > most else "")


def cases_of(
    op: str, device: torch.device | str, impls: Sequence[str], level: str = "default"
) -> Iterator[Case]:
    """What is called for an operator, and what it must move and do. Raises as `steps`, at once."""
    found = steps([op], device, level)
    return (case for step in found for case in step.cases(torch.device(device), impls))


def rows_of(
    op: str, device: torch.device | str, impls: Sequence[str], level: str = "default"
) -> Iterator[Row]:
    """`cases_of` beside plain PyTorch alone, as rows of `measure`, as they are measured."""
    found = cases_of(op, device, impls, level)
    alone = (dataclasses.replace(case, peers={}) for case in found)
    return measure.rows(alone, device=device, budget_s=BUDGET_S[level])


def _module(op: str) -> Any:
    return importlib.import_module(f"gptkernels.bench.cases.{op}")
