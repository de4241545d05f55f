"""A source file as the bytes that it stands for: as they are, or out of gzip or zstd."""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gptkernels.core.optional import optional

COMPRESSIONS = (".gz", ".zst")
"""Suffixes that may follow that of a format."""

_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_MISSING = "reading .zst needs the package backports.zstd: pip install 'gptkernels[data]'"


class Bytes(Protocol):
    """What the readers of formats need of a file.

    There is no `read`: where it meets damage, it loses what it has collected so far.
    """

    def read1(self, size: int, /) -> bytes:
        """At most `size` bytes, and none only at the end."""

    def readline(self, size: int, /) -> bytes:
        """The bytes up to and with the next line end, at most `size`."""


class Damaged(Exception):
    """The bytes from here on cannot be decompressed; the text is a clause that says why."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Bytes]:
    """The bytes of `path`. In this context, reading raises Damaged where the file is cut off or was
    not made by its suffix's program, and OSError where the disk fails.

    Raises ImportError for .zst where no package reads it.
    """
    file, broken = _open(path)
    with file:
        try:
            yield file
        except broken as error:
            raise Damaged(f"cannot be decompressed from here on ({error})") from None


def _open(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """The file, and what reading it raises where its bytes are wrong."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        zstd = optional(_ZSTD, _MISSING)
        return zstd.open(path), (EOFError, zstd.ZstdError)
    if suffix == ".gz":
        return gzip.open(path), (EOFError, gzip.BadGzipFile, zlib.error)
    return path.open("rb"), ()
