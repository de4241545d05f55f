"""Cross-entropy's rows by the CPU kernel, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import BF16, FP16, FP32, by_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import linear_cross_entropy_inputs
from right import assert_right, assert_same
from torch import Tensor

from gptkernels import linear_cross_entropy
from gptkernels.core import cpu

pytestmark = pytest.mark.usefixtures("isa")

# Around the widths of vectors, four of which go together, and the parts that are summed in fp32.
WIDTHS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    79,
    129,
    4095,
    4096,
    4097,
    9001,
]
GAP = 7  # numbers between two rows


def kernel(
    logits: Tensor,
    targets: Tensor,
    *,
    dloss: Tensor | None = None,
    forward: bool = True,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    count: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (losses, lse, logits' gradients or the logits). Without `forward` the losses and lse
    are not asked for, and NaN."""
    rows, cols = logits.shape
    memory = logits.new_full((rows * (cols + GAP),), torch.nan)
    room = memory.view(rows, cols + GAP)[:, :cols]
    room.copy_(logits)
    losses, lse = (torch.full((rows,), torch.nan) for _ in range(2))
    cpu.module().cross_entropy(
        room.data_ptr(), targets.data_ptr(), cpu.address(dloss),
        cpu.address(losses if forward else None), cpu.address(lse if forward else None),
        rows, cols, cols + GAP, ignore_index, smoothing, z_loss, softcap,
        cpu.DTYPE_CODES[logits.dtype], count,
    )  # fmt: skip
    assert memory.view(rows, cols + GAP)[:, cols:].isnan().all()  # nothing is written there
    return losses, lse, room.clone()


def drawn(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, the last class among them, and the losses' gradients."""
    targets = torch.randint(cols, (rows,))
    targets[0] = cols - 1
    return (torch.randn(rows, cols) * 3).to(dtype), targets, torch.randn(rows)


def formula(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64."""
    leaf = logits.double().requires_grad_()
    l = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    lse, logs = l.logsumexp(1), l.log_softmax(1)
    at = logs.gather(1, targets[:, None]).squeeze(1)
    losses = -(1 - smoothing) * at - smoothing * logs.mean(1)
    if z_loss:  # the gradient of a large lse loses digits in fp64 too
        losses = losses + z_loss * lse**2
    (found,) = torch.autograd.grad(losses, leaf, dloss.double())
    return losses.detach(), lse.detach(), found


@by_dtype
@pytest.mark.parametrize(
    "options", [{}, dict(smoothing=0.1, z_loss=1e-2, softcap=4.0)], ids=["plain", "options"]
)
def test_any_width(dtype: torch.dtype, options: dict[str, float]) -> None:
    """Half a unit in the last place of what is written, and what fp32 loses on the way."""
    for cols in WIDTHS:
        logits, targets, dloss = drawn(3, cols, dtype)
        exact, exact_lse, gradient = formula(logits, targets, dloss, **options)
        losses, lse, found = kernel(logits, targets, dloss=dloss, **options)
        torch.testing.assert_close(losses.double(), exact, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
        unit = torch.finfo(dtype).eps / 2 if dtype != FP32 else 0.0
        error = (found.double() - gradient).abs()
        smallest = 2.0**-24 if dtype == FP16 else 0.0
        assert (error <= unit * gradient.abs() + 4e-6 * gradient.abs() + 3e-7 + smallest).all()
        # Forward alone, and the gradient alone.
        assert_same(kernel(logits, targets, **options), [losses, lse, logits])
        assert_same([kernel(logits, targets, dloss=dloss, forward=False, **options)[2]], [found])


@by_dtype
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_the_whole_vector_is_seen(dtype: torch.dtype, softcap: float) -> None:
    """The largest logit, and the target, at any place of a row."""
    cols = 150
    logits = torch.zeros(cols, cols, dtype=dtype)
    logits.fill_diagonal_(20.0)
    targets, dloss = torch.arange(cols), torch.ones(cols)
    losses, _, found = kernel(logits, targets, dloss=dloss, softcap=softcap)
    exact, _, gradient = formula(logits, targets, dloss, softcap=softcap)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.double(), gradient, rtol=0.01, atol=1e-6)


@by_dtype
@given(
    rows=st.integers(33, 70),
    width=st.integers(6, 40),
    classes=st.integers(12, 100),
    bias=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=5)
def test_linear_cross_entropy(
    dtype: torch.dtype, rows: int, width: int, classes: int, bias: bool, seed: int, **options: Any
) -> None:
    tensors = linear_cross_entropy_inputs(rows, width, classes, dtype=dtype, bias=bias, seed=seed)
    assert_right(linear_cross_entropy, tensors, seed, impl="cpu", reduction="none", **options)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_any_finite_logit(dtype: torch.dtype, softcap: float) -> None:
    """Nothing overflows between: a row of two, one after the other."""
    values = torch.tensor([0.0, 1e-30, 1e-4, 5.0, 90.0, 1e4, 1e19, 3e38])
    values = torch.cat([values, -values])
    logits = torch.cartesian_prod(values, values).to(dtype)
    targets = torch.arange(len(logits)) % 2
    dloss = torch.ones(len(logits))
    losses, lse, found = kernel(logits, targets, dloss=dloss, softcap=softcap)
    exact, exact_lse, gradient = formula(logits, targets, dloss, softcap=softcap)
    finite = exact.float().isfinite()
    # A loss of 0.7 is lost beside 1e19 in fp64 too.
    known = finite & ((exact_lse.abs() < 1e15) | (exact > 1.0))
    torch.testing.assert_close(losses[known].double(), exact[known], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert (losses[~finite] == torch.inf).all()
    near = 1e-6 if dtype == FP32 else 0.005
    torch.testing.assert_close(found.double(), gradient, rtol=near, atol=1e-6)


@by_dtype
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("cols", [5, 16, 33, 150])
def test_minus_infinity_has_no_weight(dtype: torch.dtype, softcap: float, cols: int) -> None:
    """At any place of a row; under a softcap it is minus that."""
    logits, _, _ = drawn(cols, cols, dtype)
    logits.fill_diagonal_(-torch.inf)
    targets, dloss = (torch.arange(cols) + 1) % cols, torch.ones(cols)
    losses, _, found = kernel(logits, targets, dloss=dloss, softcap=softcap)
    exact, _, _ = formula(logits.clamp(min=-1e4), targets, dloss, softcap=softcap)
    torch.testing.assert_close(losses.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.count_nonzero(found.diag()) == 0
    assert found.isfinite().all()


@by_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_row(dtype: torch.dtype, value: float) -> None:
    """At any place of it, and those that do not count hide it."""
    for cols in (1, 5, 16, 33, 150):
        logits, targets, dloss = drawn(cols, cols, dtype)
        clean = kernel(logits, targets, dloss=dloss)
        for shift in (0, cols // 2):
            row, column = cols // 2, (cols // 2 + shift) % cols
            bad = logits.clone()
            bad[row, column] = value
            found = kernel(bad, targets, dloss=dloss)
            others = torch.arange(cols) != row
            assert not found[0][row].isfinite()
            assert not found[2][row].isfinite().any()
            assert_same([t[others] for t in found], [t[others] for t in clean])
            uncounted = targets.clone()
            uncounted[row] = -100
            losses, _, gradients = kernel(bad, uncounted, dloss=dloss)
            assert losses[row] == torch.count_nonzero(gradients[row]) == 0


@by_dtype
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Nor does the number of the other rows."""
    logits, targets, dloss = drawn(301, 700, dtype)
    options = dict(smoothing=0.1, z_loss=1e-2, softcap=4.0)
    with threads(3):
        wanted = kernel(logits, targets, dloss=dloss, **options, count=1)
        for count in (2, 3):
            assert_same(kernel(logits, targets, dloss=dloss, **options, count=count), wanted)
    for row in (0, 150, 300):
        one = slice(row, row + 1)
        alone = kernel(logits[one], targets[one].clone(), dloss=dloss[one].clone(), **options)
        assert_same(alone, [t[one] for t in wanted])


@by_dtype
@pytest.mark.parametrize("cols", [1, 33])
def test_targets(dtype: torch.dtype, cols: int) -> None:
    """A class, one that is ignored, and what is no class."""
    some = [0, cols - 1, -100, cols, -1, -(2**63), 2**63 - 1, 2**32]
    logits, _, dloss = drawn(len(some), cols, dtype)
    losses, lse, found = kernel(logits, torch.tensor(some), dloss=dloss)
    assert losses[:3].isfinite().all()
    assert losses[2] == 0
    assert losses[3:].isnan().all()
    assert lse.isfinite().all()
    assert torch.count_nonzero(found[2:]) == 0
    # A class may be the one that is ignored.
    losses, _, found = kernel(logits, torch.tensor(some), dloss=dloss, ignore_index=cols - 1)
    assert losses[1] == torch.count_nonzero(found[1]) == 0
    assert losses[2].isnan()
