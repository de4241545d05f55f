"""Runs the small kernels of tests/emulator/kernels, in the emulator or on a GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from torch import Tensor

KERNELS = ROOT / "tests" / "emulator" / "kernels"


class Case(ctypes.Structure):
    """The same struct as in tests/emulator/kernels/cases.h."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("broken", ctypes.c_int),
    )


class Emulator:
    """Runs small kernels in the emulator, one at a time."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self.library.run.argtypes = [
            *(ctypes.c_char_p, address, ctypes.c_uint, ctypes.c_uint, size),
            *(address, ctypes.c_char_p, size),
        ]

    def __call__(
        self,
        name: str,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        c_is: str = "inout",
        n: int = 0,
        broken: int = False,
        grid: tuple[int, int, int] = (1, 1, 1),
        cluster: int = 1,
        threads: int = 32,
        shared: int = 0,
    ) -> None:
        """Runs the kernel called `name`. `a` is an input and `b` an output. `c` is what `c_is`
        says: "in", "out" or "inout", which is updated in place.

        Raises RuntimeError with the message of a launch that fails.
        """
        for tensor, key, kind in ((a, b"a", "in"), (b, b"b", "out"), (c, b"c", c_is)):
            for word, written in (("in", 1), ("out", 0)):
                if tensor is not None and word in kind:
                    self.declare(key, tensor, written)
        params = Case(*(t.data_ptr() if t is not None else 0 for t in (a, b, c)), n, int(broken))
        error = ctypes.create_string_buffer(4096)
        failed = self.library.run(
            *(name.encode(), (ctypes.c_uint * 3)(*grid), cluster, threads, shared),
            *(ctypes.byref(params), error, len(error)),
        )
        self.forget()
        if failed:
            raise RuntimeError(error.value.decode())

    def declare(self, name: bytes, tensor: Tensor, written: int) -> None:
        declare = self.library.declare
        declare.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        declare(name, tensor.data_ptr(), tensor.nbytes, written)

    def forget(self) -> None:
        self.library.forget()


class Gpu(Emulator):
    """Runs the same kernels on a GPU. The caller's tensors stay on the CPU; they are copied to the
    GPU and back."""

    def __call__(
        self,
        name: str,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        **options: Any,
    ) -> None:
        there = {k: t.cuda() for k, t in {"a": a, "b": b, "c": c}.items() if t is not None}
        torch.cuda.synchronize()
        super().__call__(name, **there, **options)
        for here, key in ((a, "a"), (b, "b"), (c, "c")):
            if here is not None:
                here.copy_(there[key])

    def declare(self, name: bytes, tensor: Tensor, written: int) -> None:
        """Does nothing: a GPU checks no bounds."""

    def forget(self) -> None:
        """Does nothing, like `declare`."""


def sources(*stems: str) -> list[Path]:
    """Returns all sources of the small kernels, or those with these names, such as "sm90/wgmma"."""
    files = {
        path.relative_to(KERNELS).with_suffix("").as_posix(): path.relative_to(ROOT)
        for path in KERNELS.rglob("*")
        if path.suffix in (".cpp", ".cu")
    }
    return [files[stem] for stem in stems or sorted(files)]


def line(marker: str) -> str:
    """Returns "file:line" of the only line of the kernels that ends with the comment `marker`."""
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
    """Returns the arguments, where a, b and c are lengths, with a tensor 0, 1, 2 ... for each."""
    made = {
        key: torch.arange(value, dtype=torch.float32) if key in ("a", "b", "c") else value
        for key, value in arguments.items()
    }
    return made


def expected(name: str, sentence: str) -> str:
    pattern = re.escape(sentence).replace("\\#", "#").replace("#", "[0-9]+")
    pattern = re.sub(r"<(.+?)>", lambda found: re.escape(line(found[1].replace("\\", ""))), pattern)
    return f"{name} on a small case(?:, |: ){pattern}"
