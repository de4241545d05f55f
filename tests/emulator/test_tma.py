"""The tensor memory accelerator's copies (csrc/device/tma.h) against slices of PyTorch's tensors,
in the emulator and on a GPU (tests/emulator/kernels). Mistakes with them: test_tma_mistakes.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulated import DTYPES, Machine, Map, Shape, whole
from torch import Tensor

pytest_plugins = ["machines"]
pytestmark = pytest.mark.usefixtures("hopper")

SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # of swizzles, in bytes


# ---- what boxes hold


def strided(dtype: torch.dtype, rank: int) -> Tensor:
    """Dimensions that are no multiples of anything, rows apart, and outer ones that lie in another
    order than they are named in. The values are whole numbers, exact in every dtype."""
    sizes = [3, 2, 4, 11, 45][-rank:]
    apart = 48 * 4 // dtype.itemsize
    buffer = torch.randint(-16, 17, (*sizes[:-1], apart)).to(dtype)
    if rank >= 4:  # batch, token, head: heads lie next to each other
        buffer = buffer.transpose(-2, -3).contiguous().transpose(-2, -3)
    return buffer[..., 8 : 8 + sizes[-1]]


def box_for(tensor: Tensor, swizzle: int) -> tuple[int, ...]:
    width = (SPANS[swizzle] or 48) // tensor.itemsize
    return (width, 9, 2, 2, 1)[: tensor.dim()]


def places(tensor: Tensor, box: Sequence[int]) -> list[tuple[int, ...]]:
    """The middle, over each end of each dimension, over all ends, and off each end."""
    sizes = tensor.shape[::-1]
    middle = tuple(int(size > length) for size, length in zip(sizes, box, strict=True))
    found = [middle, tuple(-1 for _ in box)]
    found.append(tuple(size - (length + 1) // 2 for size, length in zip(sizes, box, strict=True)))
    for i, (size, length) in enumerate(zip(sizes, box, strict=True)):
        for start in (-3 if i == 0 else -1, size - 1, -length, size, -(2**31), 2**31 - 1):
            found.append((*middle[:i], start, *middle[i + 1 :]))
    return found


def overlap(
    tensor: Tensor, box: Sequence[int], at: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Of a box: where it is in the tensor, and what of it is."""
    there, here = [], []
    for size, length, start in zip(tensor.shape[::-1], box, at, strict=True):
        first, last = max(start, 0), min(start + length, size)
        last = max(first, last)
        there.append(slice(first, last))
        here.append(slice(min(first - start, length), min(last - start, length)))
    return tuple(there[::-1]), tuple(here[::-1])


def in_shared_memory(values: Tensor, swizzle: int) -> Tensor:
    """A box as it lies there: 16-byte chunks of rows are exchanged, by the row's number."""
    if swizzle == 0:
        return values.flatten()
    chunks = SPANS[swizzle] // 16
    rows = values.reshape(-1, chunks, 16 // values.itemsize)
    row = torch.arange(rows.shape[0])[:, None]
    # A pattern of 8 rows of 128 bytes: of shorter rows several share a step.
    moved = torch.arange(chunks) ^ row // (8 // chunks) % chunks
    return rows.take_along_dim(moved[:, :, None], 1).flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("rank", range(1, 6))
def test_boxes(machine: Machine, rank: int, swizzle: int, dtype: torch.dtype) -> None:
    """Loads give the tensor's elements, and zeros beyond it; stores and sums leave alone what is
    not in the box."""
    tensor = strided(dtype, rank)
    box = box_for(tensor, swizzle)
    for hint, at in enumerate(places(tensor, box)):
        there, here = overlap(tensor, box, at)
        values = torch.zeros(box[::-1], dtype=dtype)
        values[here] = tensor[there]
        out = torch.full((values.numel(),), float("nan"), dtype=dtype)
        machine(f"load_{rank}", Map(tensor, box, swizzle), at=at, b=out, n=hint % 3)
        assert out.equal(in_shared_memory(values, swizzle)), at

        values = torch.randint(-16, 17, box[::-1]).to(dtype)
        shared = in_shared_memory(values, swizzle)
        for name in ("store", "add"):
            target = strided(dtype, rank)
            want = whole(target).clone()
            view = want.as_strided(target.size(), target.stride(), target.storage_offset())
            view[there] = values[here] + (view[there] if name == "add" else 0)
            machine(f"{name}_{rank}", Map(target, box, swizzle, "inout"), at=at, a=shared)
            assert whole(target).equal(want), (name, at)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_boxes_through_two_stages(machine: Machine, count: int) -> None:
    """The last one reaches past the tensor, and its zeros are stored."""
    rows = 8 * count - 3
    tensor = torch.randn(rows, 32)
    out = torch.full((8 * count, 32), float("nan"))
    boxes = Map(tensor, (32, 8))
    shared = 4 * boxes.bytes + 16
    machine("through_stages", boxes, at=(0, 8), b=out, n=count, threads=64, shared=shared)
    assert out[:rows].equal(2 * tensor)
    assert not out[rows:].any()


@pytest.mark.parametrize("bytes", [16, 48, 4096])
def test_contiguous_bytes(machine: Machine, bytes: int) -> None:
    a, b = torch.randn(bytes // 4), torch.full((bytes // 4,), float("nan"))
    machine("bulk_there_and_back", a=a, b=b, bytes=bytes)
    assert a.equal(b)


def test_contiguous_sums(machine: Machine) -> None:
    """Of whole numbers, by four CTAs."""
    a, b = (torch.randint(-99, 99, (256,)).float() for _ in range(2))
    want = b + 4 * a
    machine("bulk_add", a=a, b=b, b_is="inout", bytes=a.nbytes, grid=(4, 1, 1))
    assert b.equal(want)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_multicast(machine: Machine, size: int) -> None:
    tensor = torch.randn(8 * size - 1, 32)
    boxes = Map(tensor, (32, 8), 3)
    out = torch.full((2, size, size, 8, 32), float("nan"))
    machine(
        "multicast",
        boxes,
        at=(0, 8),
        b=out,
        n=size,
        grid=(2 * size, 1, 1),
        cluster=size,
        shared=boxes.bytes * size + 16,
    )
    rows = torch.cat((tensor, torch.zeros(1, 32))).view(size, 8, 32)
    want = torch.stack([in_shared_memory(box, 3) for box in rows])
    assert out.view(2, size, size, -1).equal(want.expand(2, size, size, -1))


@pytest.mark.parametrize("schedule", ["reverse", "1", "2"])
@pytest.mark.parametrize("copies", ["late", "early"])
def test_schedules_give_the_same(
    emulator: Machine, schedule: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTKERNELS_EMULATE_SCHEDULE", schedule)
    monkeypatch.setenv("GPTKERNELS_EMULATE_COPIES", copies)
    test_boxes_through_two_stages(emulator, 5)
    test_contiguous_sums(emulator)
    test_contiguous_bytes(emulator, 48)
    for rank, swizzle in itertools.product((1, 4), (0, 3)):
        test_boxes(emulator, rank, swizzle, torch.bfloat16)


# ---- which maps there are


def shape_of(**changes: Any) -> Shape:
    """Of a (3, 5, 64) bf16 tensor, with changes such as box=(64, 2, 1)."""
    shape = Shape(1, 3, 1024, swizzle=3)
    values: dict[str, Any] = {"size": (64, 5, 3), "stride": (1, 64, 320), "box": (64, 4, 2)}
    for name, value in {**values, **changes}.items():
        if isinstance(value, tuple):
            getattr(shape, name)[:3] = value
        else:
            setattr(shape, name, value)
    return shape


def test_what_a_map_can_be(emulator: Machine) -> None:
    for changes in (
        {},
        {"size": (2**32, 2**32, 1), "stride": (1, 64, 7)},  # a single element has no stride
        {"size": (1, 1, 1), "stride": (5, 3, 0)},
        {"stride": (1, 2**39 - 8, 2**39 - 8)},
        {"stride": (1, 8, 8)},
        {"dtype": 0, "box": (32, 256, 256)},
        {"swizzle": 0, "box": (8, 1, 1)},
        {"swizzle": 0, "box": (256, 1, 1)},
        {"rank": 1, "size": (7, 0, 0), "stride": (1, 0, 0), "box": (64, 0, 0)},
    ):
        assert emulator.refuses(shape_of(**changes)) is None, changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "a tensor map has 1 to 5 dimensions"),
        ({"rank": 6}, "a tensor map has 1 to 5 dimensions"),
        ({"base": 0}, "the tensor has no memory"),
        ({"base": 1032}, "the tensor does not start at a multiple of 16 bytes"),
        ({"size": (64, 0, 3)}, "a dimension of the tensor is empty"),
        ({"size": (64, 5, -1)}, "a dimension of the tensor is empty"),
        ({"size": (64, 2**32 + 1, 3)}, "a dimension of the tensor is longer than 2^32"),
        ({"stride": (2, 64, 320)}, "the innermost dimension has a stride other than 1"),
        ({"stride": (1, 64, 324)}, "a stride is not a multiple of 16 bytes"),
        ({"stride": (1, 60, 320)}, "a stride is not a multiple of 16 bytes"),
        ({"stride": (1, 64, 2**39)}, "a stride is not between 0 and 2^40 bytes"),
        ({"stride": (1, 64, 2**63 - 1)}, "a stride is not between 0 and 2^40 bytes"),
        ({"stride": (1, 0, 320)}, "a stride is not between 0 and 2^40 bytes"),
        ({"stride": (1, -64, 320)}, "a stride is not between 0 and 2^40 bytes"),
        ({"box": (64, 257, 1)}, "a box is 1 to 256 elements long in each dimension"),
        ({"box": (64, 1, 0)}, "a box is 1 to 256 elements long in each dimension"),
        ({"swizzle": 0, "box": (4, 1, 1)}, "a row of the box is not a multiple of 16 bytes"),
        ({"swizzle": 0, "box": (260, 1, 1)}, "a box is 1 to 256 elements long in each dimension"),
        ({"box": (72, 1, 1)}, "a row of the box is not as long as the span of its swizzle"),
        ({"box": (32, 1, 1)}, "a row of the box is not as long as the span of its swizzle"),
        ({"swizzle": 2}, "a row of the box is not as long as the span of its swizzle"),
        ({"dtype": 0}, "a row of the box is not as long as the span of its swizzle"),
    ],
)
def test_maps_that_are_refused(emulator: Machine, changes: dict[str, Any], reason: str) -> None:
    assert emulator.refuses(shape_of(**changes)) == reason


def test_a_refused_map_is_an_error(emulator: Machine) -> None:
    tensor = torch.zeros(4, 45)
    sentence = "there is no tensor map for this tensor: a stride is not a multiple of 16 bytes"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        emulator("load_2", Map(tensor, (32, 4)))


def test_a_thread_without_a_context_makes_no_map(emulator: Machine) -> None:
    sentence = "the driver refused a tensor map with error 201: this thread has no context"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        emulator.encode(shape_of())
