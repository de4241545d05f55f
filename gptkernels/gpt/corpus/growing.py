"""A file that is only ever appended to, and goes back to a size that it had."""

from __future__ import annotations

import os
from pathlib import Path


class Growing:
    """The file at `path`, cut to its first `size` bytes and open for more.

    Raises ValueError where it has fewer: somebody else changed it.
    """

    def __init__(self, path: Path, size: int) -> None:
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(
                f"out: {path} has {there} bytes, but {size} were written: remove the folder and "
                "begin again"
            )
        self._file = path.open("ab")
        self._file.truncate(size)
        self.size = size

    def append(self, content: bytes) -> None:
        """Write `content` at the end."""
        self._file.write(content)
        self.size += len(content)

    def sync(self) -> None:
        """What was appended survives the process, and a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()
