"""What attention's tests share: both ways to sum dq, small tiles, which of PyTorch's ops ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import DEVICE, FP32
from right import assert_right

from gptkernels import attention

MASKED = DEVICE == "cpu"  # on a CPU PyTorch's fused op takes a mask and returns lse


def hold(
    tensors: dict[str, Any],
    impl: str,
    seed: int = 0,
    *,
    op: Callable[..., Any] = attention,
    **options: Any,
) -> None:
    """Asserts that `op` passes the parity rule. The CUDA kernels have two ways to sum dq in 16
    bits, so both are tested."""
    two_ways = impl == "cuda" and tensors["q"].dtype != FP32
    for deterministic in (False, True) if two_ways else (False,):
        assert_right(op, tensors, seed, impl=impl, deterministic=deterministic, **options)


def shrink_tiles(patch: pytest.MonkeyPatch, BM: int, BN: int) -> None:
    """Makes the Triton kernels' tiles so small that a few tokens fill several blocks."""
    kernels = pytest.importorskip("gptkernels.ops.attention.triton.dense")
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        tables = {
            room: {D: (BM, BN, warps, stages) for D, (_, _, warps, stages) in tiles.items()}
            for room, tiles in getattr(kernels, name).items()
        }
        patch.setattr(kernels, name, tables)


def noting(function: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    """Returns the function, changed to append its name to `notes` whenever it returns a result."""

    def noted(*arguments: Any) -> Any:
        result = function(*arguments)
        if result is not None:
            notes.append(function.__name__)
        return result

    return noted
