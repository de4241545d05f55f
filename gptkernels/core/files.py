"""Files that are always whole: the old one or the new one, never a part of it, nor a stand-in."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WINDOWS = os.name == "nt"
_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, alone: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file under. At the end of the context that file replaces
    `path`; where the context raises, `path` stays as it was.

    A rename within one folder is atomic (POSIX rename(2), os.replace on Windows). A `durable` file
    survives a power cut. Of a file that one process writes `alone`, the name beside it is always
    the same, so that the next attempt overwrites what a killed process left behind. Raises
    IsADirectoryError, before anything is written, where `path` is a folder. An OSError of the
    writing names `path`, since nobody knows the name beside it.

    Windows replaces no file that anybody has open. Programs that look at each new file have it open
    for a moment, so a refusal there is waited out for a second. Raises PermissionError, in one
    sentence, for a file that stays open.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file is wanted")
    writer = "" if alone else f".{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        _replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        # A write that fails names no file.
        if isinstance(error, OSError) and error.filename in (None, str(temporary)) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    if durable and not WINDOWS:  # where no folder can be opened
        _sync(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    for wait in (0.01, 0.05, 0.2, 0.74) if WINDOWS else ():
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(wait)
    try:
        os.replace(temporary, path)
    except PermissionError as error:
        if not WINDOWS:
            raise
        raise PermissionError(
            error.errno, "Permission denied, perhaps a program has this file open", str(path)
        ) from None


def make_folder(name: str, path: Path) -> None:
    """Make the folder `path`, and those above it, where they are not there.

    Raises OSError as `check_folder` does.
    """
    check_folder(name, path)
    path.mkdir(parents=True, exist_ok=True)


def check_folder(name: str, path: Path) -> None:
    """Find out, without making it, whether files can be written into the folder `path`.

    Raises, in one sentence about the argument `name`, NotADirectoryError where it, or one above it,
    is a file, and PermissionError where it may not be written, or may not be made.
    """
    there = next((above for above in (path, *path.parents) if above.exists()), Path())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: {there} is a folder that may not be written")


def check_file(name: str, path: Path) -> None:
    """Find out, without making it or its folder, whether the file `path` can be written.

    Raises, in one sentence about the argument `name`, IsADirectoryError where it is a folder, and
    what `check_folder` raises about the folder that it is in.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{name}: {path} is a folder, a file is wanted")
    check_folder(f"the folder of {name}", path.parent)


def check_no_pointer(path: Path) -> None:
    """Raise ValueError where `path` is a Git LFS pointer, a short text in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file it stands for: fetch that with "
                "git lfs pull"
            )


def _sync(path: Path) -> None:
    # A folder is open for reading alone; Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
