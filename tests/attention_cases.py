"""Inputs, checks and marks that the tests of `attention` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptkernels import attention
from gptkernels.core import philox
from gptkernels.core.choice import unavailable
from gptkernels.truth import baseline, parity, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
    for impl in ("torch", "triton", "cuda")
    for dtype in (FP32, FP16, BF16)
    if unavailable(impl, DEVICE, dtype) is None
]
runnable = pytest.mark.parametrize(("impl", "dtype"), RUNNABLE)
NO_CUDA = unavailable("cuda", DEVICE, FP32)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA)))
each = pytest.mark.parametrize("impl", ["torch", "triton", CUDA])
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
MASKED = DEVICE == "cpu"  # where PyTorch's fused op takes a mask and gives lse


def inputs(
    B: int = 1,
    Tq: int = 20,
    Tk: int | None = None,
    H: int = 2,
    Hk: int | None = None,
    D: int = 16,
    dtype: torch.dtype = FP32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    Tk, Hk = Tq if Tk is None else Tk, H if Hk is None else Hk

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)

    return dict(q=draw(B, Tq, H, D), k=draw(B, Tk, Hk, D), v=draw(B, Tk, Hk, D))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_right(
    tensors: dict[str, Any], impl: str, seed: int = 0, *, gradients: bool = True, **options: Any
) -> None:
    drawn = {}
    if options.get("dropout_p"):
        torch.manual_seed(seed)
        drawn = dict(rng=philox.draw(DEVICE))

    def candidate(deterministic: bool, **leaves: Any) -> Any:
        torch.manual_seed(seed)
        with parity.poisoned_outputs():
            return attention(**leaves, **options, deterministic=deterministic, impl=impl)

    # In 16 bits the CUDA kernels have two ways to dq.
    ways = (False, True) if impl == "cuda" and tensors["q"].dtype != FP32 else (False,)
    for deterministic in ways:
        parity.assert_parity(
            functools.partial(candidate, deterministic),
            functools.partial(baseline.attention, **options, **drawn),
            functools.partial(reference.attention, **options, **drawn),
            tensors,
            gradients=gradients,
            seed=seed,
            names=("out", "lse"),
        )


def run(
    call: Callable[..., Any], tensors: dict[str, Any], cotangents: list[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then gradients, for cotangents of ones if none are given."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    cotangents = cotangents or [torch.ones_like(o) for o in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return [*(o.detach() for o in outputs), *found]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def shrink_tiles(patch: pytest.MonkeyPatch, BM: int, BN: int) -> None:
    kernels = pytest.importorskip("gptkernels.ops.attention.triton.dense")
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        tables = {
            room: {D: (BM, BN, warps, stages) for D, (_, _, warps, stages) in tiles.items()}
            for room, tiles in getattr(kernels, name).items()
        }
        patch.setattr(kernels, name, tables)


def seeded(call: Callable[..., Any], tensors: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(11)
    return run(call, tensors)


def noting(function: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        result = function(*arguments)
        if result is not None:
            notes.append(function.__name__)
        return result

    return noted
