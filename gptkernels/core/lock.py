"""A folder that one process writes into at a time.

The lock is the operating system's (flock on POSIX, msvcrt on Windows), on a file in the folder that
names its holder. When the holder ends, even by SIGKILL or a power cut, the system lets go of it: a
file that is left behind locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptkernels.core.files import WINDOWS, make_folder

_NAME = ".lock"
_POLL_S = 0.02
# What file systems without locks answer, such as some that clusters mount.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def alone_in(
    name: str, folder: Path, *, patience_s: float = 0.0, file: str = _NAME
) -> Iterator[None]:
    """In this context no other one, of any process, has `folder`, which is made where it is not
    there; a folder that was made and stays empty is removed. With another name of the lock's `file`
    it is not the folder that one has, but what all that use this name take turns at.

    Raises ValueError, in one sentence about the argument `name`, where another has it, and still
    has it after `patience_s` seconds. A file system without locks gives a warning.
    """
    made = not folder.exists()
    ends = time.monotonic() + patience_s
    while True:
        try:
            opened, locked = _taken(name, folder, file)
            break
        except ValueError:
            if time.monotonic() >= ends:
                raise
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        if locked or not os.fstat(opened.fileno()).st_size:  # else it may be another run's
            _remove(opened, folder / file)
        opened.close()
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _remove(file: BinaryIO, path: Path) -> None:
    # Removed before it is let go: whoever opened it meanwhile sees that it is no longer there.
    # Windows removes no file that anybody has open.
    if WINDOWS:
        file.close()
    with contextlib.suppress(OSError):
        path.unlink()


def _taken(name: str, folder: Path, file_name: str) -> tuple[BinaryIO, bool]:
    """The file, open, and whether it is locked: not on a file system without locks."""
    path = folder / file_name
    while True:
        make_folder(name, folder)
        try:
            file = path.open("a+b")
        except FileNotFoundError:  # whoever made the folder too has just removed it again
            continue
        try:
            locked = _lock(file)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            warnings.warn(
                f"{folder} is on a file system without locks: another run in it goes unnoticed",
                stacklevel=4,
            )
            return file, False
        if not locked:
            file.seek(0)
            holder = file.read(200).decode("utf-8", errors="replace") or "another process"
            file.close()
            raise ValueError(f"{name}: {folder} is in use by {holder}, wait or name another folder")
        if _is_still(path, file):
            with contextlib.suppress(OSError):  # of a full disk; the lock needs no name in it
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file, True
        file.close()  # its holder removed it between the two


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else has the lock, which this process then has."""
    if not WINDOWS:
        fcntl = importlib.import_module("fcntl")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    msvcrt = importlib.import_module("msvcrt")
    file.seek(1 << 30)  # far behind the text: nobody else may read what is locked
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True
