"""The tensor memory accelerator's copies (csrc/device/tma.h) against slices of PyTorch's tensors,
in the emulator and on a GPU (tests/emulator/kernels). Mistakes with them: test_tma_mistakes.py."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated import sources
from harness import ROOT
from torch import Tensor

pytest_plugins = ["machines"]
pytestmark = pytest.mark.usefixtures("hopper")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # of swizzles, in bytes


class Shape(ctypes.Structure):
    """As gk::TensorMapShape."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int * 5),
        ("swizzle", ctypes.c_int),
    )


class BoxLaunch(ctypes.Structure):
    """As in tests/emulator/kernels/tma_cases.cpp."""

    _fields_ = (
        ("grid", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_size_t),
        ("shape", Shape),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("at", ctypes.c_int * 5),
        ("bytes", ctypes.c_int),
        ("n", ctypes.c_int),
        ("broken", ctypes.c_int),
    )


@dataclass
class Map:
    """Of a tensor, whose innermost dimension is its last; boxes and coordinates have it first."""

    tensor: Tensor
    box: Sequence[int]
    swizzle: int = 0
    role: str = "in"  # or "out", "inout": what kernels do to it

    @property
    def bytes(self) -> int:
        return self.tensor.itemsize * torch.Size(self.box).numel()

    def shape(self, base: int) -> Shape:
        sizes, strides = self.tensor.shape[::-1], self.tensor.stride()[::-1]
        shape = Shape(DTYPES[self.tensor.dtype], len(sizes), base, swizzle=self.swizzle)
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            shape.size[i], shape.stride[i] = size, stride
        for i, length in enumerate(self.box):
            shape.box[i] = length
        return shape


class Machine:
    """Runs one case at a time: in the emulator, or on a GPU, with the tensors on the CPU."""

    def __init__(self, library: Path, device: str) -> None:
        self.library = ctypes.CDLL(str(library))
        self.device = device
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.run_box.argtypes = [ctypes.c_char_p, address, ctypes.c_char_p, size]
        self.library.refuses.argtypes = [address]
        self.library.refuses.restype = ctypes.c_char_p

    def __call__(
        self,
        name: str,
        map: Map | None = None,
        *,
        at: Sequence[int] = (),
        a: Tensor | None = None,
        b: Tensor | None = None,
        b_is: str = "out",
        bytes: int | None = None,
        n: int = 0,
        broken: int = 0,
        grid: int = 1,
        threads: int = 32,
        cluster: int = 1,
        shared: int | None = None,
    ) -> None:
        """Raises RuntimeError with what the launch throws."""
        given = (("map", map.tensor if map else None), ("a", a), ("b", b))
        roles = {"map": map.role if map else "", "a": "in", "b": b_is}
        here = {key: whole(tensor) for key, tensor in given if tensor is not None}
        there = {key: tensor.to(self.device) for key, tensor in here.items()}
        for key, tensor in there.items():
            self.declare(key, tensor, roles[key])
        launch = BoxLaunch(grid, threads, cluster)
        size = bytes if bytes is not None else map.bytes if map else 0
        launch.shared = size + 64 if shared is None else shared
        if map:
            offset = map.tensor.storage_offset() * map.tensor.itemsize
            launch.shape = map.shape(there["map"].data_ptr() + int(offset))
        for key in ("a", "b"):
            if key in there:
                setattr(launch, key, there[key].data_ptr())
        for i, coordinate in enumerate(at):
            launch.at[i] = coordinate
        launch.bytes, launch.n, launch.broken = size, n, broken
        error = ctypes.create_string_buffer(4096)
        failed = self.library.run_box(name.encode(), ctypes.byref(launch), error, len(error))
        self.forget()
        for key, tensor in there.items():
            here[key].copy_(tensor)
        if failed:
            raise RuntimeError(error.value.decode())

    def declare(self, name: str, tensor: Tensor, role: str) -> None:
        if self.device != "cpu":
            return
        declare = self.library.declare
        declare.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for word, written in (("in", 1), ("out", 0)):
            if word in role:
                declare(name.encode(), tensor.data_ptr(), tensor.nbytes, written)

    def forget(self) -> None:
        if self.device == "cpu":
            self.library.forget()

    def refuses(self, shape: Shape) -> str | None:
        reason = self.library.refuses(ctypes.byref(shape))
        return reason.decode() if reason is not None else None


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that it is a part of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.fixture(scope="module")
def emulator(extension: ModuleType) -> Machine:
    try:
        return Machine(extension.emulated(sources(), ROOT / "build" / "emulator_kernels"), "cpu")
    except extension.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, extension: ModuleType) -> Machine:
    """What a copy gives is the same on both."""
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    chosen = sources("tma_cases", "sm90/tma")
    try:
        return Machine(extension.native_library(chosen, ROOT / "build" / "native_boxes"), "cuda")
    except extension.BuildError as error:
        pytest.skip(str(error))


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
    machine("bulk_add", a=a, b=b, b_is="inout", bytes=a.nbytes, grid=4)
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
        grid=2 * size,
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
            for i, number in enumerate(value):
                getattr(shape, name)[i] = number
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
