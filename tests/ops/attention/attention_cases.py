"""What is attention's own in its tests: two ways to dq, small tiles, what PyTorch's ops do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import DEVICE, FP32
from right import assert_right

from gptkernels import attention

MASKED = DEVICE == "cpu"  # where PyTorch's fused op takes a mask and gives lse


def hold(
    tensors: dict[str, Any],
    impl: str,
    seed: int = 0,
    *,
    op: Callable[..., Any] = attention,
    **options: Any,
) -> None:
    """To the truth; the CUDA kernels, which in 16 bits have two ways to dq, by both."""
    two_ways = impl == "cuda" and tensors["q"].dtype != FP32
    for deterministic in (False, True) if two_ways else (False,):
        assert_right(op, tensors, seed, impl=impl, deterministic=deterministic, **options)


def shrink_tiles(patch: pytest.MonkeyPatch, BM: int, BN: int) -> None:
    """Several blocks of the Triton kernels in a few tokens."""
    kernels = pytest.importorskip("gptkernels.ops.attention.triton.dense")
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        tables = {
            room: {D: (BM, BN, warps, stages) for D, (_, _, warps, stages) in tiles.items()}
            for room, tiles in getattr(kernels, name).items()
        }
        patch.setattr(kernels, name, tables)


def noting(function: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    """The function, which notes its name where it returns something."""

    def noted(*arguments: Any) -> Any:
        result = function(*arguments)
        if result is not None:
            notes.append(function.__name__)
        return result

    return noted
