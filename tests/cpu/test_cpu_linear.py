"""A linear layer of few rows by the CPU kernel, on every instruction set, and who calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import BF16, FP32, by_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptkernels.core import cpu, few_rows
from gptkernels.core.few_rows import MOST_ROWS, TRANSPOSED_ROWS
from gptkernels.nn.layers import CausalSelfAttention
from gptkernels.nn.linear import call_linear
from gptkernels.truth.parity import assert_parity


def linear_inputs(M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((M, K), (N, K), (N,))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@by_dtype
@settings(max_examples=8)
@given(
    M=st.integers(1, MOST_ROWS),
    N=st.integers(100, 200),  # PyTorch's error on few numbers is random
    K=st.integers(1, 300),
    bias=st.booleans(),
    strided=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_size(
    isa: str, dtype: torch.dtype, M: int, N: int, K: int, bias: bool, strided: bool,
    transposed: bool, seed: int,
) -> None:  # fmt: skip
    if transposed:  # other numbers of rows are PyTorch's, and so are their errors
        rows = TRANSPOSED_ROWS[dtype]
        M = min(max(M, rows[0]), rows[-1])
    x, w, b = linear_inputs(M, N, K, dtype, seed)
    w = w.t().contiguous() if transposed else w
    if strided:
        x, w = (F.pad(tensor, (3, 2), value=torch.nan)[:, 3:-2] for tensor in (x, w))
    w = w.t() if transposed else w
    tensors = dict(x=x, w=w, b=b if bias else None)
    assert_parity(few_rows.linear, own_copy, own_copy, tensors, gradients=False)


def own_copy(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    # Past a row of the strided tensors there is NaN, which oneDNN might read.
    return F.linear(x.contiguous(), w.contiguous(), b)


@by_dtype
@pytest.mark.parametrize(("N", "K"), [(1, 1), (15, 31), (17, 33), (49, 128), (67, 700)])
def test_a_row_has_the_same_bits_beside_any_others(
    isa: str, dtype: torch.dtype, N: int, K: int
) -> None:
    x, w, b = linear_inputs(MOST_ROWS, N, K, dtype)
    wanted = few_rows.linear(x, w, b)
    for M in range(1, MOST_ROWS):
        assert torch.equal(few_rows.linear(x[:M], w, b), wanted[:M])
        assert torch.equal(few_rows.linear(x[-M:], w, b), wanted[-M:])
    for columns in (1, 2, N // 2 + 1):
        part = few_rows.linear(x, w[:columns], b[:columns])
        assert torch.equal(part, wanted[:, :columns])


@by_dtype
@pytest.mark.parametrize(("N", "K"), [(2, 2), (17, 33), (49, 128), (1100, 300)])
def test_a_transposed_weight_gives_the_same_bits_beside_any_others(
    isa: str, dtype: torch.dtype, N: int, K: int
) -> None:
    """At the ends of vectors, and of the part that the cache holds."""
    rows = TRANSPOSED_ROWS[dtype]
    x, w, b = linear_inputs(rows[-1], N, K, dtype)
    w = w.t().contiguous().t()
    wanted = few_rows.linear(x, w, b)
    for M in rows:
        assert torch.equal(few_rows.linear(x[-M:], w, b), wanted[-M:])
    for columns in (2, N // 2 + 1):
        assert torch.equal(few_rows.linear(x, w[:columns], b[:columns]), wanted[:, :columns])


@by_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(
    isa: str, dtype: torch.dtype, transposed: bool
) -> None:
    x, w, b = linear_inputs(5, 1001, 130, dtype)
    w = w.t().contiguous().t() if transposed else w
    found = []
    for count in (1, 2, 7, 64):
        with threads(count):
            found.append(few_rows.linear(x, w, b))
    assert all(torch.equal(found[0], other) for other in found[1:])


@by_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("K", [33, 64, 95])
@pytest.mark.parametrize("transposed", [False, True])
def test_not_a_number_stays_in_its_row(
    isa: str, dtype: torch.dtype, value: float, K: int, transposed: bool
) -> None:
    x, w, b = linear_inputs(8, 70, K, dtype)
    w = w.t().contiguous().t() if transposed else w
    clean = few_rows.linear(x, w, b)
    x[3, K - 1] = w[20, 0] = w[69, K - 1] = value
    found = few_rows.linear(x, w, b)
    rows, columns = torch.arange(8) != 3, torch.arange(70)
    columns = (columns != 20) & (columns != 69)
    assert torch.equal(found[rows][:, columns], clean[rows][:, columns])
    assert not found[3].isfinite().any()
    assert not found[:, ~columns].isfinite().any()


@by_dtype
@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (MOST_ROWS + 1, 5, 7)], ids=str)
def test_what_the_kernel_does_not_take_is_pytorchs(
    isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    x, w, b = linear_inputs(*sizes, dtype)
    torch.testing.assert_close(few_rows.linear(x, w, b), F.linear(x, w, b))
    w = torch.stack([w, w], -1)[..., 0]
    torch.testing.assert_close(few_rows.linear(x[:3], w, b), F.linear(x[:3], w, b))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that the kernel was called with."""
    if cpu.unavailable("cpu") is not None or cpu.instruction_set() == "baseline":
        pytest.skip("'auto' does not take the CPU kernels here")
    seen: list[int] = []
    linear = few_rows.linear

    def spy(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        seen.append(x.shape[0])
        return linear(x, w, b)

    monkeypatch.setattr(few_rows, "linear", spy)
    return seen


@torch.no_grad()
def test_a_layer_of_few_rows_runs_by_the_kernel(calls: list[int]) -> None:
    layer = nn.Linear(33, 20)
    x = torch.randn(2, 3, 33)
    y = call_linear(layer, x, "auto")
    torch.testing.assert_close(y, layer(x))
    assert y.shape == (2, 3, 20)
    assert calls == [6]
    assert torch.equal(call_linear(layer, x, "cpu"), y)
    layer.weight.data.mul_(2)  # nothing of a weight is kept
    layer.bias.data.zero_()
    torch.testing.assert_close(call_linear(layer, x, "auto"), layer(x))
    with torch.inference_mode():
        frozen = copy.deepcopy(layer)
        torch.testing.assert_close(call_linear(frozen, x, "auto"), layer(x))
    assert calls == [6] * 4


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, given, y: y + 1)
    return layer


def broadcast(layer: nn.Linear) -> nn.Linear:
    layer.bias = nn.Parameter(torch.ones(1))
    return layer


def sparse(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return layer


@pytest.mark.parametrize(
    "change",
    [
        dict(impl="torch"),
        dict(x=torch.ones(MOST_ROWS + 1, 33)),
        dict(x=torch.ones(3, 33, requires_grad=True)),
        dict(x=torch.ones(0, 33)),
        dict(x=torch.ones(3, 33).double(), make=nn.Module.double),
        dict(x=torch.ones(3, 0), make=lambda layer: nn.Linear(0, 20)),
        dict(make=hooked),
        dict(make=nn.utils.parametrizations.weight_norm),
        dict(make=nn.Sequential),
        dict(make=broadcast),
        dict(make=sparse),
    ],
    ids=[
        "impl", "many rows", "gradient", "no rows", "fp64", "no columns", "hook", "parametrised",
        "another class", "bias of 1", "sparse",
    ],
)  # fmt: skip
def test_a_layer_is_called_itself_where_the_kernel_would_not_do(
    calls: list[int], change: dict[str, Any]
) -> None:
    make: Callable[[nn.Linear], Callable[[Tensor], Tensor]] = change.get("make", lambda x: x)
    layer = make(nn.Linear(33, 20))
    x, impl = change.get("x", torch.ones(3, 33)), change.get("impl", "auto")
    with torch.set_grad_enabled(x.requires_grad):
        assert torch.equal(call_linear(layer, x, impl), layer(x))
    assert calls == []


@torch.no_grad()
def test_an_exported_layer_takes_any_number_of_tokens() -> None:
    layer = CausalSelfAttention(32, 4).eval()
    tokens = {1: torch.export.Dim("T", min=2, max=100)}
    whole = torch.export.export(layer, (torch.randn(1, 40, 32),), dynamic_shapes={"x": tokens})
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(whole.module()(x), layer(x))


@pytest.mark.usefixtures("isa")
def test_the_kernel_takes_as_many_rows_as_python_gives_it() -> None:
    assert cpu.module().most_rows == MOST_ROWS


@torch.no_grad()
def test_errors_and_autocast_are_the_layers_own(calls: list[int]) -> None:
    layer = nn.Linear(33, 20)
    with torch.autocast("cpu", dtype=BF16):
        assert call_linear(layer, torch.randn(3, 33), "auto").dtype == BF16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_linear(layer, torch.randn(3, 32), "auto")
    with pytest.raises(RuntimeError, match="dtype"):
        call_linear(layer, torch.randn(3, 33, dtype=torch.float64), "auto")
    with pytest.raises(RuntimeError, match="dtype"):
        call_linear(layer, torch.randn(3, 33).to(BF16), "auto")
    layer.bias = nn.Parameter(torch.empty(20, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        call_linear(layer, torch.randn(3, 33), "auto")
    assert calls == []
    assert layer.weight.dtype == FP32
