"""The emulator's twins of what only Hopper has, as tests/test_emulator.py tests the others: each
against PyTorch, and for each detector a kernel with the mistake that it is there to find, and the
same kernel without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_emulator import THREAD, Emulator, emulator, expected, extension, machine
from torch import Tensor

from gptkernels import parity

__all__ = ["emulator", "extension", "machine"]  # fixtures


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of which this is no twin there is nothing to test."""
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm90")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


# ---- wgmma

DTYPES = [torch.bfloat16, torch.float16]
ACCUMULATE, TRANSPOSED_A, TRANSPOSED_B, FROM_REGISTERS = 1, 2, 4, 8
FORMS = {
    "k-k": 0,
    "mn-k": TRANSPOSED_A,
    "k-mn": TRANSPOSED_B,
    "mn-mn": TRANSPOSED_A | TRANSPOSED_B,
    "registers-k": FROM_REGISTERS,
    "registers-mn": FROM_REGISTERS | TRANSPOSED_B,
}


def multiply(machine: Emulator, a: Tensor, b: Tensor, form: int, start: Tensor | None) -> Tensor:
    """a (64, 128) times b (128, N) as the form says, added to start (64, N)."""
    columns = b.shape[1]
    stored = [a.T if form & TRANSPOSED_A else a, b if form & TRANSPOSED_B else b.T]
    out = torch.full((64, columns), float("nan"))
    machine(
        f"wgmma_{'bf16' if a.dtype == torch.bfloat16 else 'f16'}_{columns}",
        a=torch.cat([matrix.flatten() for matrix in stored]),
        b=out,
        c=start,
        c_is="in",
        n=form if start is None else form | ACCUMULATE,
        threads=128,
        shared=2 * 128 * (64 + (columns + 63) // 64 * 64),
    )
    return out


@pytest.mark.parametrize("columns", range(16, 257, 16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_whole_numbers(machine: Emulator, dtype: torch.dtype, columns: int) -> None:
    """Small ones, so that every sum is exact: each element comes from its own row and column."""
    for form in FORMS.values():
        a = torch.randint(-8, 9, (64, 128)).to(dtype)
        b = torch.randint(-8, 9, (128, columns)).to(dtype)
        product = a.double() @ b.double()
        assert multiply(machine, a, b, form, None).double().equal(product)
        start = torch.randint(-99, 100, (64, columns)).float()
        assert multiply(machine, a, b, form, start).double().equal(product + start)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(machine: Emulator, dtype: torch.dtype, form: str) -> None:
    """fp32 sums of 16-bit numbers, as exact as PyTorch's."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 144).to(dtype)
    truth = a.double() @ b.double()
    found = multiply(machine, a, b, FORMS[form], None)
    assert parity.compare(found, a.float() @ b.float(), truth, k=parity.K_FORWARD).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_take_in_every_number(machine: Emulator, dtype: torch.dtype) -> None:
    """Subnormal numbers, the largest, infinities and NaN, each times 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for part in bits.view(8, 128, 64):
        b = part.view(dtype)
        found = multiply(machine, torch.eye(64, 128, dtype=dtype), b, TRANSPOSED_B, None)
        lost = ~b.isfinite().all(0)  # 0 times infinity is NaN, in the whole column
        assert found[:, ~lost].equal(b[:64, ~lost].float())
        assert not found[:, lost].isfinite().all(0).any()


def test_stmatrix(machine: Emulator) -> None:
    a, out = torch.randn(64, 64).bfloat16(), torch.empty(2, 64, 64, dtype=torch.bfloat16)
    machine("stmatrix", a=a, c=out, c_is="out", threads=128, shared=2 * 64 * 128)
    assert out[0].equal(a)
    blocks = a.view(4, 16, 4, 16)  # each transposed where it is
    assert out[1].equal(blocks.transpose(1, 3).reshape(64, 64))


# How the products of two (64, 64) are launched that are right or have one mistake.
PRODUCT: dict[str, Any] = {"threads": 128, "shared": 2 * 64 * 128}
ISSUE = "csrc/device/wgmma.h:#, called at <issue>, called at"

# name -> (what else there is to say of the launch, what is said after the kernel's name), as BROKEN
# in tests/test_emulator.py.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "product_without_wait": (
        {},
        f"{THREAD} <write_out>, called at <product_without_wait>: reads accumulators of a wgmma "
        "that has not been waited for",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(emulator: Emulator, name: str) -> None:
    more, sentence = BROKEN[name]
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    arguments = {**PRODUCT, "a": a, "b": b, **more}
    emulator(name, **arguments)
    with pytest.raises(RuntimeError) as error:
        emulator(name, broken=True, **arguments)
    assert re.fullmatch(expected(name, sentence), str(error.value)), str(error.value)
