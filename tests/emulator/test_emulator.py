"""The emulator of the CUDA kernels, on small kernels of its own (tests/emulator/kernels): each
primitive against a case worked by hand, on a GPU too; schedules, settings, the dropout contract.
Mistakes that it finds: test_emulator_mistakes.py."""

from __future__ import annotations

import pytest
import torch
from emulated import COPY, CTA, Machine, N, launched

from gptkernels.core import philox

pytest_plugins = ["machines"]

LANES = torch.arange(32, dtype=torch.int32)


def test_shuffles(machine: Machine) -> None:
    out = torch.full((12, 32), -1, dtype=torch.int32)
    machine("shuffles", c=out, c_is="out")
    out -= 100  # each lane brings its number + 100
    lanes = LANES.tolist()
    assert out[0].tolist() == [0, 1, 2, *range(29)]
    assert out[1].tolist() == [*range(3, 32), 29, 30, 31]
    assert out[2].tolist() == [i ^ 5 for i in lanes]
    assert out[3].tolist() == [9] * 32
    # In segments of 8 lanes
    up = [0, 1, 2, 0, 1, 2, 3, 4]
    down = [3, 4, 5, 6, 7, 5, 6, 7]
    assert out[4].tolist() == [i // 8 * 8 + up[i % 8] for i in lanes]
    assert out[5].tolist() == [i // 8 * 8 + down[i % 8] for i in lanes]
    # i ^ 12 leaves the segment upwards for lanes 0-7 and 16-23, which keep their own value; the
    # others read from an earlier segment, as shfl.bfly does.
    assert out[6].tolist() == [i if i // 8 % 2 == 0 else i ^ 12 for i in lanes]
    assert out[7].tolist() == [i // 8 * 8 + 1 for i in lanes]
    # Of 35, 2^32 - 1, 37 and -1 five bits count.
    assert out[8].tolist() == out[0].tolist()
    assert out[9].tolist() == [31, *range(1, 32)]
    assert out[10].tolist() == out[2].tolist()
    assert out[11].tolist() == [31] * 32


def test_votes(machine: Machine) -> None:
    out = torch.full((6, 32), -1, dtype=torch.int32)
    machine("votes", c=out, c_is="out")
    thirds = 0b01001001001001001001001001001001
    assert out[0].tolist() == [thirds] * 32
    assert out[1].tolist() == [1] * 32
    assert out[2].tolist() == [0] * 32
    assert out[3].tolist() == [1] * 32
    assert out[4].tolist() == [1] * 16 + [0] * 16
    fifths = [1 << 0 | 1 << 5 | 1 << 10 | 1 << 15, 1 << 20 | 1 << 25 | 1 << 30]
    assert out[5].tolist() == [fifths[0]] * 16 + [fifths[1]] * 16


@pytest.mark.parametrize(("name", "threads"), [("turns", 32), ("turns_of_cta", 96)])
def test_barriers(machine: Machine, name: str, threads: int) -> None:
    a, b = torch.arange(threads, dtype=torch.float32), torch.empty(threads)
    machine(name, a=a, b=b, n=5, threads=threads, shared=4 * threads)
    assert b.equal(a.roll(-5))


def test_named_barriers(emulator: Machine) -> None:
    a, b = torch.arange(128, dtype=torch.float32), torch.empty(128)
    emulator("turns_of_pairs", a=a, b=b, n=5, threads=128, shared=512)
    assert b.view(2, 64).equal(a.view(2, 64).roll(-5, dims=1))


def test_arriving_at_a_barrier_without_waiting(emulator: Machine) -> None:
    arguments = launched(CTA)
    emulator("named_barrier", **arguments)
    assert arguments["b"][64:].equal(arguments["a"][:64])


def test_atomics(machine: Machine) -> None:
    ctas, threads = 3, 64
    found, sums = torch.empty(ctas * threads), torch.tensor([0.0, 2.0])
    machine("atomics", b=found, c=sums, grid=(ctas, 1, 1), threads=threads)
    numbers = range(ctas * threads)
    assert sums.tolist() == [len(numbers), 2 + sum(numbers)]
    assert sorted(found.tolist()) == list(numbers)  # each add finds what the one before it left


def test_indices(machine: Machine) -> None:
    x, y, z, threads = 2, 3, 2, 40
    out = torch.empty(z, y, x, threads, 4, dtype=torch.int32)
    machine("indices", c=out, c_is="out", grid=(x, y, z), threads=threads)
    ranges = [torch.arange(size, dtype=torch.int32) for size in (z, y, x, threads)]
    k, j, i, t = torch.meshgrid(*ranges, indexing="ij")
    assert out.equal(torch.stack((i, j, k, t), dim=-1))


def test_ldmatrix(machine: Machine) -> None:
    """Matrix m holds 1000 m + 10 row + col; a register's lower half comes first."""
    matrix, row, col = torch.meshgrid(
        torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij"
    )
    shared = (1000 * matrix + 10 * row + col).to(torch.int16)
    out = torch.empty(2, 4, 32, 2, dtype=torch.int16)
    machine("ldmatrix", c=shared, c_is="in", b=out, shared=512)
    plain, transposed = out.tolist()
    # By hand: lane 0 holds the start of row 0, lane 5 columns 2 and 3 of row 1, lane 31 the end of
    # row 7; transposed the same of columns.
    assert [plain[0][lane] for lane in (0, 5, 31)] == [[0, 1], [12, 13], [76, 77]]
    assert [transposed[0][lane] for lane in (0, 5, 31)] == [[0, 10], [21, 31], [67, 77]]
    for m in range(4):
        for lane in range(32):
            row, col = lane // 4, lane % 4 * 2
            at = 1000 * m
            assert plain[m][lane] == [at + 10 * row + col, at + 10 * row + col + 1]
            assert transposed[m][lane] == [at + 10 * col + row, at + 10 * (col + 1) + row]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(machine: Machine, dtype: torch.dtype) -> None:
    """Small whole numbers, so that every sum is exact."""
    a = torch.randint(-8, 9, (16, 16)).to(dtype)
    b = torch.randint(-8, 9, (16, 8)).to(dtype)
    out = torch.empty(16, 8)
    name = "mma_bf16" if dtype == torch.bfloat16 else "mma_f16"
    machine(name, a=torch.cat((a.flatten(), b.flatten())), b=out)
    assert out.double().equal(1 + a.double() @ b.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_tiles(
    machine: Machine, dtype: torch.dtype, aligned: bool, a_transposed: bool, b_transposed: bool
) -> None:
    """Every layout, parts of tiles, rows that no 16-byte access fits; sums that are exact."""
    name = {4: "tile_product_f32", 2: "tile_product_f16"}[dtype.itemsize]
    name = "tile_product_bf16" if dtype == torch.bfloat16 else name
    stride = 56 if aligned else 53
    for rows, cols, depth in ((32, 32, 48), (27, 31, 37), (1, 1, 1), (17, 8, 16)):
        a, b = torch.randint(-1, 2, (rows, depth)), torch.randint(-1, 2, (depth, cols))
        stored = [a.T if a_transposed else a, b if b_transposed else b.T]
        # Between the rows, and past them, what a product must not take in.
        buffers = torch.full((2, 48, stride), float("nan"))
        for buffer, matrix in zip(buffers, stored, strict=True):
            buffer[: matrix.shape[0], : matrix.shape[1]] = matrix
        where = torch.tensor([rows, cols, depth, 0, stride, 48 * stride, stride], dtype=torch.int32)
        out = torch.empty(2, 32, 32)
        options = a_transposed + 2 * b_transposed + 4 * aligned
        elements = 2 * 32 * 48
        machine(
            name,
            a=buffers.to(dtype),
            b=out,
            c=where,
            c_is="in",
            n=options,
            threads=64,
            shared=elements * dtype.itemsize,
        )
        want = torch.zeros(2, 32, 32)
        want[0, :rows, :cols] = (a @ b).float()
        first = torch.zeros(32, 32)
        first[: min(depth, 32), :cols] = b[:32]
        want[1] = want[0] @ first
        assert torch.equal(out, want)


def test_copies_fill_with_zeros(emulator: Machine) -> None:
    """Of 16 bytes the first 0, 4, 8, 12 or 16 are copied, and what they miss need not exist."""
    floats = torch.arange(32) % 5
    a, b = torch.arange(1, N, dtype=torch.float32), torch.empty(N)  # one float short
    counts = (4 * floats).to(torch.int32)
    assert counts[-1] == 4
    emulator("copy_zero_fill", a=a, b=b, c=counts, c_is="in", n=N, shared=4 * N)
    valid = torch.arange(4) < floats[:, None]
    assert b.view(32, 4).equal(torch.where(valid, torch.arange(1.0, N + 1).view(32, 4), 0.0))


@pytest.mark.parametrize("when", ["late", "early"])
def test_when_copies_arrive(emulator: Machine, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel looks before it waits, which the emulator is kept from seeing."""
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", when)
    a, b = torch.arange(1, N + 1, dtype=torch.float32), torch.empty(N // 4)
    emulator("copy_looked_at", a=a, b=b, n=N, shared=4 * N)
    assert b.equal(a[::4] if when == "early" else torch.zeros(N // 4))


@pytest.mark.parametrize(
    "setting",
    [
        *({"GPTKERNELS_EMULATE_SCHEDULE": order} for order in ("forward", "reverse", "1", "2")),
        *({"GPTKERNELS_EMULATE_COPIES": when} for when in ("late", "early")),
    ],
    ids=lambda setting: next(iter(setting.values())),
)
def test_schedules_give_the_same_and_find_the_same(
    emulator: Machine, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    for name, arguments in (("copy_without_wait", COPY), ("read_after_write", CTA)):
        tensors = launched(arguments)
        emulator(name, **tensors)
        by = -4 if name == "copy_without_wait" else 1
        want = tensors["a"].roll(by)
        want[: max(by, 0)] = tensors["a"][0]
        assert tensors["b"].equal(want)
        with pytest.raises(RuntimeError, match=r"may still write|no barrier|nobody has written"):
            emulator(name, broken=True, **tensors)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SCHEDULE", "sideways", "must be forward, reverse or a number, got sideways"),
        ("COPIES", "never", "must be late or early, got never"),
    ],
)
def test_settings_that_are_none(
    emulator: Machine,
    name: str,
    value: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"GPTKERNELS_EMULATE_{name}", value)
    with pytest.raises(RuntimeError, match=f"GPTKERNELS_EMULATE_{name} {sentence}"):
        emulator("nothing")


# ---- the dropout contract


@pytest.mark.parametrize("transposed", [False, True], ids=["queries as rows", "keys as rows"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_keep_bits_of_a_block_of_scores(machine: Machine, transposed: bool, p: float) -> None:
    for query, key, batch_head in ((0, 0, 0), (32, 16, 4), (16, 144, 5)):
        rng = philox.draw("cpu")
        where = torch.tensor([*rng, query, key, batch_head])
        out = torch.empty(16, 16)
        threshold = philox.threshold(p)
        machine("attention_keep", b=out, c=where, c_is="in", n=threshold, broken=transposed)
        whole = philox.attention_keep(rng, p, 2, 3, query + 16, key + 16)
        want = whole[batch_head // 3, batch_head % 3, query:, key:]
        assert torch.equal(out.bool(), want.T if transposed else want)


@pytest.mark.parametrize("first", [0, 8, 3, 2**35 - 8, 2**35 + 5, 2**40 + 7])
def test_keep_bits_of_elements(machine: Machine, first: int) -> None:
    """From the first element of a Philox call or from one between, past 32 bits of the counter."""
    rng, out = philox.draw("cpu"), torch.empty(32, 8)
    where = torch.tensor([*rng, first])
    machine("elementwise_keep", b=out, c=where, c_is="in", n=philox.threshold(0.4))
    group = torch.arange(first // 8, first // 8 + 33)
    lanes = philox._lanes(rng, group & 0xFFFFFFFF, group >> 32, torch.zeros_like(group))
    kept = lanes.view(-1) >= philox.threshold(0.4)
    assert torch.equal(out.bool().view(-1), kept[first % 8 :][:256])
