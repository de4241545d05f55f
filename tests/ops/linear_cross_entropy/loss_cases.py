"""What the test modules of linear_cross_entropy share. They are of the implementations that hold
the logits of a chunk of rows: those that hold a tile have tests of their own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import BF16, DTYPES, FP32, name_of, of
from right import HOW, assert_right

from gptkernels import linear_cross_entropy
from gptkernels.ops.linear_cross_entropy import chunks
from gptkernels.ops.linear_cross_entropy import torch as operators
from gptkernels.truth import baseline, parity, reference

OPS = torch.ops.gptkernels
FWD, BWD = OPS.linear_cross_entropy_fwd.default, OPS.linear_cross_entropy_bwd.default
# Every option at once.
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}

each = pytest.mark.parametrize("impl", [of("torch"), of("cpu")])
runnable = pytest.mark.parametrize(
    ("impl", "dtype"),
    [of(i, d, dtype=d, id=f"{i}-{name_of(d)}") for i in ("torch", "cpu") for d in DTYPES],
)
# Those of which the gradients of a sum or a mean come in the forward pass.
at_once = pytest.mark.parametrize(
    ("impl", "dtype"),
    [of(i, d, dtype=d, id=f"{i}-{name_of(d)}") for i in ("torch", "cpu") for d in (FP32, BF16)],
)


@contextlib.contextmanager
def in_pieces() -> Iterator[None]:
    """Inside, what is computed in pieces to save memory is so for small calls too: a chunk has 32
    rows or C, whichever is more, and in 16 bits 2 C."""
    small = {"_LEAST_BYTES": 0, "_LEAST_ROWS": 1, "_ROWS_OF_DX": 20, "_CLASSES_TOGETHER": 24}
    with (
        mock.patch.multiple(chunks, **small),
        mock.patch.object(operators, "_CPU_BYTES", 4096),
        mock.patch.object(operators, "_BYTES", 4096),
    ):
        yield


def hold(tensors: dict[str, Any], seed: int = 0, *, reduction: str = "none", **how: Any) -> None:
    """Asserts that the losses and the gradients pass the parity rule. Of a sum or a mean only the
    gradients: PyTorch's error of a single number is random."""
    if reduction == "none":
        assert_right(linear_cross_entropy, tensors, seed, reduction=reduction, **how)
        return
    how["reduction"] = reduction
    formula = {k: v for k, v in how.items() if k not in HOW}
    gradients_hold(
        functools.partial(linear_cross_entropy, **how),
        functools.partial(baseline.linear_cross_entropy, **formula),
        functools.partial(reference.linear_cross_entropy, **formula),
        tensors,
        seed,
    )


def gradients_hold(
    call: Callable[..., Any],
    like: Callable[..., Any],
    truth: Callable[..., Any],
    tensors: dict[str, Any],
    seed: int = 0,
) -> None:
    found = parity.measure(call, like, truth, tensors, seed=seed)
    assert any(m.direction == "gradient" for m in found)
    failures = [str(m) for m in found if m.direction == "gradient" and not m.passed]
    assert not failures, "\n".join(failures)


def bound(tensors: dict[str, Any], **how: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The op with these targets and options, and its differentiable inputs."""
    call = functools.partial(linear_cross_entropy, targets=tensors["targets"], **how)
    return call, {k: v for k, v in tensors.items() if k != "targets" and v is not None}
