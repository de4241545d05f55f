"""A file that is only ever appended to, and goes back to a size that it had."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class Growing:
    """The file at `path`, cut to its first `size` bytes and open for more.

    Raises ValueError where it has fewer, since somebody else changed it. Every method raises
    OSError, which names the file, where the disk refuses.
    """

    def __init__(self, path: Path, size: int) -> None:
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(
                f"out: {path} has {there} bytes, but {size} were written: remove the folder and "
                "begin again"
            )
        self._path = path
        # Unbuffered: what an interrupted run left in a buffer would be written when Python collects
        # the file, perhaps after another run has gone on with it.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)
        self.size = size

    def append(self, content: bytes) -> None:
        """Write `content` at the end."""
        left = memoryview(content)
        with self._named():
            while left:  # the system may take a part
                left = left[self._file.write(left) :]
        self.size += len(content)

    def sync(self) -> None:
        """What was appended survives the process, and a power cut."""
        with self._named():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # from a write, which does not name the file
            raise OSError(error.errno, error.strerror, str(self._path)) from None
