"""Tests of the kernels run on every instruction set that this machine has; on the highest one the
ops' own tests run them (tests/ops)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptkernels.core import cpu

SETS = cpu.module().instruction_sets() if cpu.unavailable("cpu") is None else ["none"]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the kernels use during the test."""
    reason = cpu.unavailable("cpu")
    if reason is not None:
        pytest.skip(f"impl='cpu': {reason}")
    before = cpu.module().instruction_set()
    cpu.module().use(request.param)
    yield request.param
    cpu.module().use(before)
