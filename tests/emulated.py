"""Small kernels (tests/emulator/kernels) as tests run them: in the emulator and, where there is
one, on a GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT
from torch import Tensor

KERNELS = ROOT / "tests" / "emulator" / "kernels"


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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


class Given(ctypes.Structure):
    """As in tests/emulator/kernels/cases.cpp."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_size_t),
        ("shape", Shape),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
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

    def shape(self, storage: int) -> Shape:
        """With the tensor's storage at this address."""
        base = storage + int(self.tensor.storage_offset()) * self.tensor.itemsize
        shape = Shape(DTYPES[self.tensor.dtype], self.tensor.dim(), base, swizzle=self.swizzle)
        shape.size[: shape.rank] = self.tensor.shape[::-1]
        shape.stride[: shape.rank] = self.tensor.stride()[::-1]
        shape.box[: shape.rank] = self.box
        return shape


class Machine:
    """Runs one case at a time, on tensors of the CPU: in the emulator, or on a GPU ("cuda")."""

    def __init__(self, library: Path, device: str = "cpu") -> None:
        self.library, self.device = ctypes.CDLL(str(library)), device
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.run.argtypes = [ctypes.c_char_p, address, ctypes.c_char_p, size]
        self.library.encode.argtypes = [address, ctypes.c_char_p, size]
        self.library.refuses.argtypes = [address]
        self.library.refuses.restype = ctypes.c_char_p
        if device == "cpu":  # a GPU is told of no bounds
            self.library.declare.argtypes = [ctypes.c_char_p, address, size, ctypes.c_int]

    def __call__(
        self,
        name: str,
        map: Map | None = None,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        b_is: str = "out",
        c_is: str = "inout",
        at: Sequence[int] = (),
        bytes: int | None = None,
        n: int = 0,
        broken: int = False,
        grid: tuple[int, int, int] = (1, 1, 1),
        cluster: int = 1,
        threads: int = 32,
        shared: int | None = None,
    ) -> None:
        """a is an input, b and c what `b_is` and `c_is` say: in, out, or inout, updated in place.
        `bytes` is the size of a box, by default the map's; shared memory holds it and a barrier.

        Raises RuntimeError with what the launch throws.
        """
        box = bytes if bytes is not None else map.bytes if map else 0
        shared = (box and box + 64) if shared is None else shared
        given = Given(grid, cluster, threads, shared, bytes=box, n=n, broken=int(broken))
        given.at[: len(at)] = at
        roles = {"map": map.role if map else "", "a": "in", "b": b_is, "c": c_is}
        tensors = {"map": whole(map.tensor) if map else None, "a": a, "b": b, "c": c}
        here = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        there = {key: tensor.to(self.device) for key, tensor in here.items()}
        for key, tensor in there.items():
            self.declare(key, tensor, roles[key])
            if key != "map":
                setattr(given, key, tensor.data_ptr())
        if map:
            given.shape = map.shape(there["map"].data_ptr())
        error = ctypes.create_string_buffer(4096)
        failed = self.library.run(name.encode(), ctypes.byref(given), error, len(error))
        if self.device == "cpu":
            self.library.forget()
        if failed:  # after which a GPU may refuse every copy
            raise RuntimeError(error.value.decode())
        for key, tensor in there.items():
            here[key].copy_(tensor)

    def declare(self, name: str, tensor: Tensor, role: str) -> None:
        for word, written in (("in", 1), ("out", 0)):
            if word in role and self.device == "cpu":
                self.library.declare(name.encode(), tensor.data_ptr(), tensor.nbytes, written)

    def encode(self, shape: Shape) -> None:
        """Makes the tensor map on a thread that has no context. Raises RuntimeError."""
        error = ctypes.create_string_buffer(4096)
        if self.library.encode(ctypes.byref(shape), error, len(error)):
            raise RuntimeError(error.value.decode())

    def refuses(self, shape: Shape) -> str | None:
        """Why there is no such tensor map."""
        reason = self.library.refuses(ctypes.byref(shape))
        return reason.decode() if reason is not None else None


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that it is a part of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def sources(*stems: str) -> list[Path]:
    """All of them, or those of these names, such as "sm90/wgmma"."""
    files = {
        path.relative_to(KERNELS).with_suffix("").as_posix(): path.relative_to(ROOT)
        for path in KERNELS.rglob("*")
        if path.suffix in (".cpp", ".cu")
    }
    return [files[stem] for stem in stems or sorted(files)]


def line(marker: str) -> str:
    """ "file:line" of the one line of the kernels that ends with the comment."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in KERNELS.rglob("*.cu")
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if text.endswith(f"// {marker}")
    ]
    assert len(found) == 1, (marker, found)
    return found[0]


N = 128
WARP: dict[str, Any] = {"a": 32, "b": 32, "n": 32, "shared": 128}
CTA: dict[str, Any] = {"a": N, "b": N, "n": N, "threads": N, "shared": 4 * N}
COPY: dict[str, Any] = {**CTA, "threads": N // 4}
THREAD = "CTA (0, 0, 0), thread #, at"


def launched(arguments: dict[str, Any]) -> dict[str, Any]:
    """With a tensor of 0, 1, 2 ... for each length."""
    return {
        key: torch.arange(value, dtype=torch.float32) if key in ("a", "b", "c") else value
        for key, value in arguments.items()
    }


def assert_named(machine: Machine, name: str, sentence: str, **arguments: Any) -> None:
    """The launch fails, and says the sentence after the kernel's name: <marker> stands for a line
    of the kernels, # for any number, ... for anything."""
    with pytest.raises(RuntimeError) as error:
        machine(name, **arguments)
    pattern = re.escape(sentence).replace(r"\.\.\.", ".*").replace(r"\#", "[0-9]+")
    pattern = re.sub(r"<(.+?)>", lambda found: re.escape(line(found[1].replace("\\", ""))), pattern)
    said = str(error.value)
    assert re.fullmatch(f"{name} on a small case(?:, |: ){pattern}", said), said
