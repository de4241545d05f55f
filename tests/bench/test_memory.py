"""The most memory that a call takes, on a CPU by the system's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptkernels.bench import memory, timing

CPU = torch.device("cpu")
MIB = 1 << 20

counted = pytest.mark.skipif(
    memory._trim() is None or memory.peak_bytes(lambda: torch.ones(4 * MIB), CPU) is None,
    reason="the system does not tell the highest resident size, or lets nobody reset it",
)


@counted
@pytest.mark.parametrize("mib", [8, 64])
def test_all_that_is_held_at_one_time_counts(mib: int) -> None:
    """Two tensors at a time, of three; also where freed memory stays with the process."""
    timing._keep_freed_memory()

    def call() -> torch.Tensor:
        x = torch.ones(mib * MIB // 4)
        y = x + 1
        del x
        return y.mul_(2)

    for _ in range(2):
        found = memory.peak_bytes(call, CPU)
        assert found is not None
        assert abs(found - 2 * mib * MIB) <= 2 * MIB


@counted
def test_little_is_not_told() -> None:
    assert memory.peak_bytes(lambda: torch.ones(8), CPU) is None


def test_where_the_system_does_not_tell_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # which nobody can write
    assert memory.peak_bytes(lambda: torch.ones(4 * MIB), CPU) is None
    monkeypatch.setattr(memory, "_trim", lambda: None)
    assert memory.peak_bytes(lambda: torch.ones(4 * MIB), CPU) is None
