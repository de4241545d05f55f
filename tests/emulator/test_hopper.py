"""The emulator's twins of what only Hopper has, as test_emulator.py tests the others: each
against PyTorch, and for each detector a kernel with the mistake that it is there to find, and the
same kernel without."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulated import THREAD, Machine, assert_named
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


def multiply(machine: Machine, a: Tensor, b: Tensor, form: int, start: Tensor | None) -> Tensor:
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
        shared=2 * 128 * (64 + columns),
    )
    return out


@pytest.mark.parametrize("columns", range(16, 257, 16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_whole_numbers(machine: Machine, dtype: torch.dtype, columns: int) -> None:
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
def test_products(machine: Machine, dtype: torch.dtype, form: str) -> None:
    """Once rounded, as exact as PyTorch's."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 144).to(dtype)
    truth = a.double() @ b.double()
    found = multiply(machine, a, b, FORMS[form], None).to(dtype)
    assert parity.compare(found, a @ b, truth, k=parity.K_FORWARD).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_fp32(emulator: Machine, dtype: torch.dtype) -> None:
    """A GPU may truncate where the emulator rounds."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, 144).to(dtype)
    truth = a.double() @ b.double()
    found = multiply(emulator, a, b, 0, None)
    assert parity.compare(found, a.float() @ b.float(), truth, k=parity.K_FORWARD).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_take_in_every_number(emulator: Machine, dtype: torch.dtype) -> None:
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


def test_stmatrix(machine: Machine) -> None:
    a, out = torch.randn(64, 64).bfloat16(), torch.empty(2, 64, 64, dtype=torch.bfloat16)
    machine("stmatrix", a=a, c=out, c_is="out", threads=128, shared=2 * 64 * 128)
    assert out[0].equal(a)
    blocks = a.view(4, 16, 4, 16)  # each transposed where it is
    assert out[1].equal(blocks.transpose(1, 3).reshape(64, 64))


def product(**changes: Any) -> dict[str, Any]:
    """How the product of two random (64, 64), right or with one mistake, is launched."""
    a, b = torch.randn(2, 64, 64).bfloat16(), torch.full((64, 64), float("nan"))
    return {"a": a, "b": b, "threads": 128, "shared": 2 * 64 * 128, **changes}


MULTIPLY = "csrc/device/wgmma.h:#"
ISSUE = f"{MULTIPLY}, called at <issue>"
GROUP = f"{ISSUE}, called at <group>"
WAIT = f"{MULTIPLY}, called at <wait for products>"
FILL = "csrc/device/vector.h:#, called at <fill operand>, called at <fill A>"
READ = "reads accumulators of a wgmma that has not been waited for"

# Other numbers of threads than 128
THREADS = {
    "product_given_back_early": 256,
    "product_given_back_by_one": 384,
    "product_of_three_warps": 96,
}

# name -> what is said after the kernel's name, as BROKEN in test_emulator_mistakes.py
BROKEN: dict[str, str] = {
    # Accumulators and A's registers
    "product_without_wait": f"{THREAD} <write_out>, called at <product_without_wait>: {READ}",
    "product_without_commit": (
        f"{THREAD} <write_out>, called at <finish>, called at <product_without_commit>: {READ}"
    ),
    "product_wait_short_by_one": (
        f"{THREAD} <write_out>, called at <product_wait_short_by_one>: {READ}"
    ),
    "product_half_waited_for": f"{THREAD} <write_out>, called at <product_half_waited_for>: {READ}",
    "product_accumulator_changed": (
        f"{THREAD} {WAIT}, called at <product_accumulator_changed>: an accumulator of a "
        "wgmma.mma_async was written before it was waited for"
    ),
    "product_without_fence": (
        f"{THREAD} {GROUP}, called at <product_without_fence>: wgmma.mma_async comes before any "
        "wgmma_fence"
    ),
    "product_rescaled": (
        f"{THREAD} {GROUP}, called at <product_rescaled>: wgmma.mma_async has accumulators that "
        "were touched after the last wgmma_fence"
    ),
    "product_rounded": (
        f"{THREAD} {MULTIPLY}, called at <product_rounded>: wgmma.mma_async has registers of A "
        "that were touched after the last wgmma_fence"
    ),
    "product_of_two_shapes": (
        f"{THREAD} {MULTIPLY}, called at <product_of_two_shapes>: wgmma.mma_async has accumulators "
        "some of which a product of another shape, not waited for, has too"
    ),
    # Operands in shared memory
    "product_operand_overwritten": (
        f"{THREAD} <overwritten>: writes 2 bytes at byte # of shared memory, which the "
        f"asynchronous engine read at {GROUP}, called at <reads what is overwritten>, with no "
        "barrier between"
    ),
    "product_given_back_early": (
        f"{THREAD} <product_given_back>: writes 2 bytes at byte # of shared memory, which the "
        f"asynchronous engine read at {GROUP}, called at <reads what is given back>, with no "
        "barrier between"
    ),
    "product_given_back_by_one": (
        f"{THREAD} <product_given_back>: writes 2 bytes at byte # of shared memory, which the "
        f"asynchronous engine read at {GROUP}, called at <reads what is given back>, with no "
        "barrier between"
    ),
    "product_operand_changed": (
        f"{THREAD} {WAIT}, called at <product_operand_changed>: B of a wgmma.mma_async has changed "
        "before it was waited for, within 32 bytes from byte 8928 of shared memory on"
    ),
    "product_without_proxy_fence": (
        f"{THREAD} {GROUP}, called at <product_without_proxy_fence>: reads 32 bytes at byte # of "
        f"shared memory by the asynchronous proxy, which thread # wrote at {FILL}, called at "
        "<without proxy fence>, with no fence_proxy_async of that thread between"
    ),
    "product_without_barrier": (
        f"{THREAD} {GROUP}, called at <product_without_barrier>: reads 32 bytes at byte # of "
        f"shared memory, which thread # wrote at {FILL}, called at <without barrier of stores>, "
        "with no barrier between"
    ),
    "product_of_own_rows": (
        f"{THREAD} {GROUP}, called at <product_of_own_rows>: reads 32 bytes at byte # of shared "
        "memory, which nobody has written"
    ),
    "product_of_own_columns": (
        f"{THREAD} {MULTIPLY}, called at <product_of_own_columns>: reads 32 bytes at byte # of "
        "shared memory, which nobody has written"
    ),
    "product_of_half_an_atom": (
        f"{THREAD} {MULTIPLY}, called at <product_of_half_an_atom>: the descriptor of B names "
        "atoms of 64 columns, and the operand has 32, no whole number of atoms"
    ),
    # Threads that do not agree
    "product_diverges": (
        f"{THREAD} {ISSUE}, called at <product_diverges: low>: wgmma.mma_async diverges: thread # "
        f"of the same warpgroup is in wgmma.mma_async at {ISSUE}, called at <product_diverges: "
        "high>"
    ),
    "product_of_two_minds": (
        f"{THREAD} {MULTIPLY}, called at <product_of_two_minds>: wgmma.mma_async: the warpgroup's "
        "threads do not agree on the descriptor of B"
    ),
    "product_of_three_warps": (
        f"{THREAD} {MULTIPLY}, called at <product_of_three_warps>: wgmma.fence needs a warpgroup, "
        "four whole warps, and the CTA has 96 threads"
    ),
    "product_not_waited_for_by_all": (
        "deadlock, nobody can go on; CTA (0, 0, 0): threads 0-76, 78-127 wait in wgmma.wait_group "
        f"at {WAIT}, called at <product_not_waited_for_by_all>, threads 77 returned"
    ),
}


@pytest.mark.parametrize("schedule", ["forward", "reverse", "1"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found_and_named(
    emulator: Machine, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    arguments = product(threads=THREADS.get(name, 128))
    emulator(name, **arguments)
    # Who finds it, and where, is the schedule's.
    sentence = BROKEN[name] if schedule == "forward" else "..."
    assert_named(emulator, name, sentence, broken=True, **arguments)


def whole_numbers(**changes: Any) -> tuple[dict[str, Any], Tensor]:
    """As product(), and what the first matrix times the transpose of the second is, exactly."""
    a = torch.randint(-3, 4, (2, 64, 64)).bfloat16()
    return product(a=a, **changes), a[0].double() @ a[1].double().T


@pytest.mark.parametrize("name", BROKEN)
def test_without_the_mistake_products_are_right(machine: Machine, name: str) -> None:
    launch, want = whole_numbers(threads=THREADS.get(name, 128))
    machine(name, **launch)
    a, b = launch["a"].double(), launch["b"]
    if name == "product_of_three_warps":  # does nothing
        return
    if name == "product_rounded":
        want = want.bfloat16().double() @ a[1].T
    if name == "product_of_half_an_atom":
        want = a[0] @ a[1]
    if name == "product_of_own_columns":
        want = a[0].T @ a[1].T
    if name == "product_rescaled":
        want += a[0, :, :32] @ a[1, :, :32].T
    if name == "product_accumulator_changed":
        changed = b == 100
        assert int(changed.sum()) >= 128  # one a thread
        b[changed] = want[changed].float()
    assert b.double().equal(want)


def test_sums_start_anew(machine: Machine) -> None:
    launch, want = whole_numbers()
    machine("product_started_anew", **launch)
    assert launch["b"].double().equal(want)


def test_a_change_of_a_is_found(emulator: Machine) -> None:
    emulator("product_operand_changed", **product(n=1))
    sentence = ": A of a wgmma.mma_async has changed before it was waited for, within 32 bytes from"
    with pytest.raises(RuntimeError, match=f"{sentence} byte 736 of shared memory on"):
        emulator("product_operand_changed", **product(n=1, broken=True))


def test_an_overwritten_a_is_found(emulator: Machine) -> None:
    emulator("product_operand_overwritten", **product(n=1))
    with pytest.raises(RuntimeError, match="which the asynchronous engine read at"):
        emulator("product_operand_overwritten", **product(n=1, broken=True))


@pytest.mark.parametrize(("n", "what"), [(1, "the descriptor of A"), (2, "whether to accumulate")])
def test_what_threads_do_not_agree_on(emulator: Machine, n: int, what: str) -> None:
    with pytest.raises(RuntimeError, match=f"threads do not agree on {what}"):
        emulator("product_of_two_minds", **product(n=n, broken=True))


def test_different_accumulators_are_found(emulator: Machine) -> None:
    launch, want = whole_numbers()
    emulator("product_of_two_sums", **launch)
    assert launch["b"].double().equal(want)
    with pytest.raises(RuntimeError, match="threads have different accumulators"):
        emulator("product_of_two_sums", broken=True, **launch)


def words(addend: int) -> Tensor:
    """A 64-bit number as two of 32."""
    halves = [addend & 0xFFFFFFFF, addend >> 32 & 0xFFFFFFFF]
    return torch.tensor([half - 2**32 if half >= 2**31 else half for half in halves]).int()


def test_what_descriptors_name(machine: Machine) -> None:
    launch, want = whole_numbers(c_is="in")
    a, b = launch["a"].double(), launch["b"]
    machine("product_of_descriptor", c=words(0), **launch)
    assert b.double().equal(want)
    # The same bytes, read along the other way: B is the second matrix itself.
    machine("product_of_descriptor", c=words(0), n=1, **launch)
    assert b.double().equal(a[0] @ a[1])
    # Of a K-major operand LBO means nothing.
    machine("product_of_descriptor", c=words(77 << 16), **launch)
    assert b.double().equal(want)


@pytest.mark.parametrize("mn_major", [0, 1])
def test_a_wrong_stride_names_other_rows(emulator: Machine, mn_major: int) -> None:
    """Half of 1,024 bytes: each second group of 8 rows starts within the one before."""
    launch, want = whole_numbers(c=words(-32 << 32), c_is="in", n=mn_major)
    emulator("product_of_descriptor", **launch)
    a = launch["a"].double()
    rows = torch.empty(64, 64, dtype=torch.float64)  # of 128 bytes, as the hardware finds them
    for row in range(64):
        step, group = (row // 16 * 2048, row // 8 % 2) if mn_major else (0, row // 8)
        start = step + group * 512 + row % 8 * 128
        for chunk in range(8):
            address = start + 16 * chunk ^ start // 128 % 8 * 16
            # From which row and chunk of the matrix come the 16 bytes at an address of its tile?
            of_row, of_chunk = address // 128, address // 16 % 8 ^ address // 128 % 8
            rows[row, 8 * chunk : 8 * chunk + 8] = a[1, of_row, 8 * of_chunk : 8 * of_chunk + 8]
    found = a[0] @ (rows if mn_major else rows.T)
    assert launch["b"].double().equal(found)
    assert not found.equal(a[0] @ a[1] if mn_major else want)


@pytest.mark.parametrize(
    ("addend", "mn_major", "sentence"),
    [
        (1 << 14, 0, "has bits set that mean nothing"),
        (3 << 62, 0, "names no swizzle, and all tiles have one"),
        (
            3 << 49,
            0,
            "has base offset 3, and tiles are aligned to the swizzle's pattern, for which it is 0",
        ),
        (
            4 * 8,
            0,
            "starts 512 bytes past a multiple of 1024, within the swizzle's pattern",
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
    emulator: Machine, addend: int, mn_major: int, sentence: str
) -> None:
    launch = product(c=words(addend), c_is="in", n=mn_major)
    with pytest.raises(RuntimeError, match=re.escape(f": the descriptor of B {sentence}")):
        emulator("product_of_descriptor", **launch)


def test_wgmma_needs_hopper(emulator: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_ARCH", "sm80")
    with pytest.raises(RuntimeError, match="wgmma needs"):
        emulator("product_without_wait", **product())
    with pytest.raises(RuntimeError, match="stmatrix needs"):
        emulator("stmatrix", **product(b=None, c=torch.empty(2, 64, 64).bfloat16(), c_is="out"))
