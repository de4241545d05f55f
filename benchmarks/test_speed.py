"""The benchmarks' cases under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptkernels.bench import OPERATORS, cases_of

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _calls() -> Iterator[Any]:
    for op in OPERATORS:
        for case in cases_of(op, _DEVICE, ("triton", "torch"), quick=True):
            group = f"{op} {case.shape} {case.dtype} {case.direction}"
            for impl, call in case.candidates.items():
                yield pytest.param(
                    call, id=f"{group} [{impl}]", marks=pytest.mark.benchmark(group=group)
                )


@pytest.mark.parametrize("call", list(_calls()))
def test_speed(call: Any, benchmark: Any) -> None:
    def synchronised() -> None:
        call()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)
