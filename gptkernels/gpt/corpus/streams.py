"""A source file as the bytes that it stands for: as they are, or out of gzip or zstd."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from gptkernels.core.optional import optional

COMPRESSIONS = (".gz", ".zst")
"""Suffixes that may follow that of a format."""

_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_MISSING = "reading .zst needs the package backports.zstd: pip install 'gptkernels[data]'"


class Bytes(Protocol):
    """What the readers of formats need of a file.

    Both raise Damaged where the file is cut off or was not made by its suffix's program, and
    OSError where the disk fails. There is no `read`: where it meets damage, it loses what it has
    collected so far.
    """

    def read1(self, size: int, /) -> bytes:
        """At most `size` bytes, and none only at the end."""

    def readline(self, size: int, /) -> bytes:
        """The bytes up to and with the next line end, at most `size`."""


class Damaged(Exception):
    """The bytes from here on cannot be decompressed; the text is a clause that says why."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Bytes]:
    """The bytes of `path`, which is closed at the end of the context.

    Raises ImportError for .zst where no package reads it.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        zstd = optional(_ZSTD, _MISSING)
        with zstd.open(path) as file:
            yield _Unpacked(file, (EOFError, zstd.ZstdError))
    elif suffix == ".gz":
        with gzip.open(path) as file:
            yield _Unpacked(file, (EOFError, gzip.BadGzipFile, zlib.error))
    else:
        with path.open("rb") as file:
            yield file


def check_compression(path: Path) -> None:
    """Raise ImportError, in one sentence, where no package decompresses `path`."""
    if path.suffix.lower() == ".zst":
        optional(_ZSTD, _MISSING)


class _Unpacked:
    """A file that a library decompresses, and raises one of `broken` where its bytes are wrong."""

    def __init__(self, file: Any, broken: tuple[type[Exception], ...]) -> None:
        self._file, self._broken = file, broken

    def read1(self, size: int, /) -> bytes:
        return self._read(self._file.read1, size)

    def readline(self, size: int, /) -> bytes:
        return self._read(self._file.readline, size)

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except self._broken as error:
            raise Damaged(f"cannot be decompressed from here on ({error})") from None
