"""The emulator's twins of what only Hopper has, as test_emulator.py tests the others: each
against PyTorch, and for each detector a kernel with the mistake that it is there to find, and the
same kernel without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulated import THREAD, Emulator, expected
from torch import Tensor

from gptkernels.truth import parity

pytest_plugins = ["machines"]
pytestmark = pytest.mark.usefixtures("hopper")


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
    """Once rounded, as exact as PyTorch's."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 144).to(dtype)
    truth = a.double() @ b.double()
    found = multiply(machine, a, b, FORMS[form], None).to(dtype)
    assert parity.compare(found, a @ b, truth, k=parity.K_FORWARD).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_fp32(emulator: Emulator, dtype: torch.dtype) -> None:
    """A GPU may truncate where the emulator rounds."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 144).to(dtype)
    truth = a.double() @ b.double()
    found = multiply(emulator, a, b, 0, None)
    assert parity.compare(found, a.float() @ b.float(), truth, k=parity.K_FORWARD).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_take_in_every_number(emulator: Emulator, dtype: torch.dtype) -> None:
    """Subnormal numbers, the largest, infinities and NaN, each times 1."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    eye = torch.eye(128, dtype=dtype)
    for b in numbers.where(numbers.isfinite(), 0).view(4, 128, 128):
        found = [multiply(emulator, half, b, TRANSPOSED_B, None) for half in (eye[:64], eye[64:])]
        assert torch.cat(found).equal(b.float())
    # 0 times infinity is NaN: these one in a column.
    b = torch.zeros(128, 16, dtype=dtype)
    b[0] = numbers[~numbers.isfinite()][:: (~numbers.isfinite()).sum() // 15][:16]
    b[0, :2] = torch.tensor([float("inf"), float("-inf")])
    found = multiply(emulator, eye[:1].expand(64, 128), b, 0, None)
    assert torch.allclose(found, b[:1].float().expand(64, 16), rtol=0, atol=0, equal_nan=True)


def test_stmatrix(machine: Emulator) -> None:
    a, out = torch.randn(64, 64).bfloat16(), torch.empty(2, 64, 64, dtype=torch.bfloat16)
    machine("stmatrix", a=a, c=out, c_is="out", threads=128, shared=2 * 64 * 128)
    assert out[0].equal(a)
    blocks = a.view(4, 16, 4, 16)  # each transposed where it is
    assert out[1].equal(blocks.transpose(1, 3).reshape(64, 64))


# How the products of two (64, 64) are launched that are right or have one mistake.
PRODUCT: dict[str, Any] = {"threads": 128, "shared": 2 * 64 * 128}
MULTIPLY = "csrc/device/wgmma.h:#"
ISSUE = f"{MULTIPLY}, called at <issue>"
WAIT = f"{MULTIPLY}, called at <wait for products>"
FILL = "csrc/device/vector.h:#, called at <fill operand>, called at <fill A>"
READ = "reads accumulators of a wgmma that has not been waited for"

# name -> (what else there is to say of the launch, what is said after the kernel's name), as BROKEN
# in test_emulator_mistakes.py.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    # Accumulators and A's registers
    "product_without_wait": (
        {},
        f"{THREAD} <write_out>, called at <product_without_wait>: {READ}",
    ),
    "product_without_commit": (
        {},
        f"{THREAD} <write_out>, called at <finish>, called at <product_without_commit>: {READ}",
    ),
    "product_wait_short_by_one": (
        {},
        f"{THREAD} <write_out>, called at <product_wait_short_by_one>: {READ}",
    ),
    "product_half_waited_for": (
        {},
        f"{THREAD} <write_out>, called at <product_half_waited_for>: {READ}",
    ),
    "product_accumulator_changed": (
        {},
        f"{THREAD} {WAIT}, called at <product_accumulator_changed>: "
        "an accumulator of a wgmma.mma_async was written before it was waited for",
    ),
    "product_without_fence": (
        {},
        f"{THREAD} {ISSUE}, called at <product_without_fence>: "
        "wgmma.mma_async comes before any wgmma_fence",
    ),
    "product_rescaled": (
        {},
        f"{THREAD} {ISSUE}, called at <product_rescaled>: "
        "wgmma.mma_async has accumulators that were touched after the last wgmma_fence",
    ),
    "product_rounded": (
        {},
        f"{THREAD} {MULTIPLY}, called at <product_rounded>: "
        "wgmma.mma_async has registers of A that were touched after the last wgmma_fence",
    ),
    "product_of_two_shapes": (
        {},
        f"{THREAD} {MULTIPLY}, called at <product_of_two_shapes>: wgmma.mma_async has accumulators "
        "some of which a product of another shape, not waited for, has too",
    ),
    # Operands in shared memory
    "product_operand_overwritten": (
        {},
        f"{THREAD} <overwritten>: writes 2 bytes at byte # of shared memory, which the "
        f"asynchronous engine read at {ISSUE}, called at <reads what is overwritten>, "
        "with no barrier between",
    ),
    "product_given_back_early": (
        {"threads": 256},
        f"{THREAD} <product_given_back_early>: writes 2 bytes at byte # of shared memory, which "
        f"the asynchronous engine read at {ISSUE}, called at <reads what is given back>, "
        "with no barrier between",
    ),
    "product_given_back_by_one": (
        {"threads": 384},
        f"{THREAD} <product_given_back_by_one>: writes 2 bytes at byte # of shared memory, which "
        f"the asynchronous engine read at {ISSUE}, called at <reads what one gives back>, "
        "with no barrier between",
    ),
    "product_operand_changed": (
        {},
        f"{THREAD} {WAIT}, called at <product_operand_changed>: B of a "
        "wgmma.mma_async has changed before it was waited for, within 32 bytes from byte 8928 of "
        "shared memory on",
    ),
    "product_without_proxy_fence": (
        {},
        f"{THREAD} {ISSUE}, called at <product_without_proxy_fence>: reads 32 bytes at byte # of "
        f"shared memory by the asynchronous proxy, which thread # wrote at {FILL}, called at "
        "<without proxy fence>, with no fence_proxy_async of that thread between",
    ),
    "product_without_barrier": (
        {},
        f"{THREAD} {ISSUE}, called at <product_without_barrier>: reads 32 bytes at byte # of "
        f"shared memory, which thread # wrote at {FILL}, called at "
        "<without barrier of stores>, with no barrier between",
    ),
    "product_of_own_rows": (
        {},
        f"{THREAD} {ISSUE}, called at <product_of_own_rows>: reads 32 bytes at byte # of shared "
        "memory, which nobody has written",
    ),
    "product_of_own_columns": (
        {},
        f"{THREAD} {MULTIPLY}, called at <product_of_own_columns>: reads 32 bytes at byte # of "
        "shared memory, which nobody has written",
    ),
    # Threads that do not agree
    "product_diverges": (
        {},
        f"{THREAD} {ISSUE}, called at <product_diverges: low>: wgmma.mma_async diverges: thread # "
        f"of the same warpgroup is in wgmma.mma_async at {ISSUE}, called at "
        "<product_diverges: high>",
    ),
    "product_of_two_minds": (
        {},
        f"{THREAD} {MULTIPLY}, called at <product_of_two_minds>: wgmma.mma_async: the warpgroup's "
        "threads do not agree on the descriptor of B",
    ),
    "product_of_three_warps": (
        {"threads": 96},
        f"{THREAD} {MULTIPLY}, called at <product_of_three_warps>: wgmma.fence needs a warpgroup, "
        "four whole warps, and the CTA has 96 threads",
    ),
    "product_not_waited_for_by_all": (
        {},
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 0-76, 78-127 wait in "
        f"wgmma.wait_group at {WAIT}, called at "
        "<product_not_waited_for_by_all>, threads 77 returned",
    ),
}


@pytest.mark.parametrize("schedule", ["forward", "reverse", "1"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(
    emulator: Emulator, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    more, sentence = BROKEN[name]
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    arguments = {**PRODUCT, "a": a, "b": b, **more}
    emulator(name, **arguments)
    with pytest.raises(RuntimeError) as error:
        emulator(name, broken=True, **arguments)
    if schedule == "forward":  # who finds it, and where, is the schedule's
        assert re.fullmatch(expected(name, sentence), str(error.value)), str(error.value)


def whole_numbers() -> tuple[Tensor, Tensor]:
    """Two (64, 64), and the product of the first with the transpose of the second."""
    a = torch.randint(-3, 4, (2, 64, 64)).bfloat16()
    return a, a[0].double() @ a[1].double().T


@pytest.mark.parametrize("name", BROKEN)
def test_without_the_mistake_products_are_right(machine: Emulator, name: str) -> None:
    a, want = whole_numbers()
    b = torch.full((64, 64), float("nan"))
    machine(name, **{**PRODUCT, "a": a, "b": b, **BROKEN[name][0]})
    if name == "product_of_three_warps":  # does nothing
        return
    if name == "product_rounded":
        want = want.bfloat16().double() @ a[1].double().T
    if name == "product_of_own_columns":
        want = a[0].double().T @ a[1].double().T
    if name == "product_rescaled":
        want += a[0, :, :32].double() @ a[1, :, :32].double().T
    if name == "product_accumulator_changed":
        changed = b == 100
        assert int(changed.sum()) >= 128  # one a thread
        b[changed] = want[changed].float()
    assert b.double().equal(want)


def test_sums_start_anew(machine: Emulator) -> None:
    a, want = whole_numbers()
    b = torch.full((64, 64), float("nan"))
    machine("product_started_anew", a=a, b=b, **PRODUCT)
    assert b.double().equal(want)


def test_a_change_of_a_is_found(emulator: Emulator) -> None:
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    emulator("product_operand_changed", a=a, b=b, n=1, **PRODUCT)
    sentence = ": A of a wgmma.mma_async has changed before it was waited for, within 32 bytes from"
    with pytest.raises(RuntimeError, match=f"{sentence} byte 736 of shared memory on"):
        emulator("product_operand_changed", a=a, b=b, n=1, broken=True, **PRODUCT)


def test_an_overwritten_a_is_found(emulator: Emulator) -> None:
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    emulator("product_operand_overwritten", a=a, b=b, n=1, **PRODUCT)
    with pytest.raises(RuntimeError, match="which the asynchronous engine read at"):
        emulator("product_operand_overwritten", a=a, b=b, n=1, broken=True, **PRODUCT)


@pytest.mark.parametrize(("n", "what"), [(1, "the descriptor of A"), (2, "whether to accumulate")])
def test_what_threads_do_not_agree_on(emulator: Emulator, n: int, what: str) -> None:
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    with pytest.raises(RuntimeError, match=f"threads do not agree on {what}"):
        emulator("product_of_two_minds", a=a, b=b, n=n, broken=True, **PRODUCT)


def test_different_accumulators_are_found(emulator: Emulator) -> None:
    a, want = whole_numbers()
    b = torch.empty(64, 64)
    emulator("product_of_two_sums", a=a, b=b, **PRODUCT)
    assert b.double().equal(want)
    with pytest.raises(RuntimeError, match="threads have different accumulators"):
        emulator("product_of_two_sums", a=a, b=b, broken=True, **PRODUCT)


def words(addend: int) -> Tensor:
    """A 64-bit number as two of 32."""
    halves = [addend & 0xFFFFFFFF, addend >> 32 & 0xFFFFFFFF]
    return torch.tensor([half - 2**32 if half >= 2**31 else half for half in halves]).int()


def test_what_descriptors_name(machine: Emulator) -> None:
    a, want = whole_numbers()
    b, options = torch.full((64, 64), float("nan")), {**PRODUCT, "c_is": "in"}
    machine("product_of_descriptor", a=a, b=b, c=words(0), **options)
    assert b.double().equal(want)
    # The same bytes, read along the other way: B is the second matrix itself.
    machine("product_of_descriptor", a=a, b=b, c=words(0), n=1, **options)
    assert b.double().equal(a[0].double() @ a[1].double())
    # Of a K-major operand LBO means nothing.
    machine("product_of_descriptor", a=a, b=b, c=words(77 << 16), **options)
    assert b.double().equal(want)


@pytest.mark.parametrize("mn_major", [0, 1])
def test_a_wrong_stride_names_other_rows(emulator: Emulator, mn_major: int) -> None:
    """Half of 1,024 bytes: each second group of 8 rows starts within the one before."""
    a, want = whole_numbers()
    b = torch.full((64, 64), float("nan"))
    options = {**PRODUCT, "c": words(-32 << 32), "c_is": "in", "n": mn_major}
    emulator("product_of_descriptor", a=a, b=b, **options)
    rows = torch.empty(64, 64, dtype=torch.float64)  # of 128 bytes, as the hardware finds them
    for row in range(64):
        step, group = (row // 16 * 2048, row // 8 % 2) if mn_major else (0, row // 8)
        start = step + group * 512 + row % 8 * 128
        for chunk in range(8):
            address = start + 16 * chunk ^ start // 128 % 8 * 16
            # From which row and chunk of the matrix come the 16 bytes at an address of its tile?
            of_row, of_chunk = address // 128, address // 16 % 8 ^ address // 128 % 8
            rows[row, 8 * chunk : 8 * chunk + 8] = a[1, of_row, 8 * of_chunk : 8 * of_chunk + 8]
    found = a[0].double() @ (rows if mn_major else rows.T)
    assert b.double().equal(found)
    assert not found.equal(a[0].double() @ a[1].double() if mn_major else want)


@pytest.mark.parametrize(
    ("addend", "mn_major", "sentence"),
    [
        (1 << 14, 0, "has bits set that mean nothing"),
        (1 << 62, 0, "names swizzle 2, and tiles have that of 128 bytes, 1"),
        (
            3 << 49,
            0,
            "has base offset 3, and tiles are aligned to 1,024 bytes, for which it is 0",
        ),
        (
            4 * 8,
            0,
            "starts 512 bytes past a multiple of 1,024, within the swizzle's pattern",
        ),
        (
            1,
            0,
            "starts 16 bytes into a row of 128, of which a step of k takes 32 aligned bytes",
        ),
        (2, 1, "starts 32 bytes into a row of 128, of which an MN-major operand takes all"),
        (64, 0, "leads to byte 16384 of shared memory, which has 16384"),
        (-576, 0, "leads to byte -1024 of shared memory, which has 16384"),
        (64 << 32, 0, "leads to byte 16384 of shared memory, which has 16384"),
    ],
)
def test_a_descriptor_that_names_nothing(
    emulator: Emulator, addend: int, mn_major: int, sentence: str
) -> None:
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    with pytest.raises(RuntimeError, match=re.escape(f": the descriptor of B {sentence}")):
        emulator(
            "product_of_descriptor", a=a, b=b, c=words(addend), c_is="in", n=mn_major, **PRODUCT
        )


def test_wgmma_needs_hopper(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.empty(64, 64)
    with pytest.raises(RuntimeError, match="wgmma needs"):
        emulator("product_without_wait", a=a, b=b, **PRODUCT)
    with pytest.raises(RuntimeError, match="stmatrix needs"):
        emulator("stmatrix", a=a, c=torch.empty(2, 64, 64).bfloat16(), c_is="out", **PRODUCT)
