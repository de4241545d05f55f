"""core.lock: one process at a time in a folder, and no lock of a dead one."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import ROOT

from gptkernels.core import lock
from gptkernels.core.lock import alone_in

HOLDER = """
import sys, time
from pathlib import Path
from gptkernels.core.lock import alone_in
with alone_in("out", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def held_by(folder: Path) -> subprocess.Popen[bytes]:
    """A process that holds the folder, and stays."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_second_one_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = held_by(tmp_path)
    try:
        with (
            pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on ") as refused,
            alone_in("out", tmp_path),
        ):
            pass
        assert socket.gethostname() in str(refused.value)
        os.kill(holder.pid, signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".lock").exists()  # which no longer locks
    with alone_in("out", tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())


def test_two_in_one_process(tmp_path: Path) -> None:
    with alone_in("out", tmp_path):
        with (
            pytest.raises(ValueError, match=rf"^out: .* in use by process {os.getpid()} on"),
            alone_in("out", tmp_path),
        ):
            pass
        with pytest.raises(ValueError, match="in use"), alone_in("out", tmp_path):
            pass  # the refused one has not let go of the first one's lock
    with alone_in("out", tmp_path):
        pass


def test_a_folder_that_was_made_and_stays_empty_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone_in("out", tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with alone_in("out", tmp_path / "new"):
        (tmp_path / "new" / "a").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with (
            pytest.raises(
                NotADirectoryError, match=r"^out must be a folder, but \S+file is a file$"
            ),
            alone_in("out", path),
        ):
            pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(file: object) -> bool:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock, "_lock", refuses)
    with pytest.warns(UserWarning, match="a file system without locks"), alone_in("out", tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").write_text("process 1 on another")
    with pytest.warns(UserWarning, match="a file system without locks"), alone_in("out", tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "process 1 on another"


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its functions played: what is locked cannot be read, nor what is open removed."""
    held: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 1 << 30)
        inode = os.fstat(descriptor).st_ino
        if inode in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(inode)

    unlink = Path.unlink

    def refuses_open_files(path: Path) -> None:
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        if str(path) in {os.readlink(link) for link in links if link.is_symlink()}:
            raise PermissionError(errno.EACCES, "in use by another process")
        held.discard(path.stat().st_ino)
        unlink(path)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(lock, "WINDOWS", True)
    monkeypatch.setattr(Path, "unlink", refuses_open_files)
    for _ in range(2):
        with alone_in("out", tmp_path):
            with pytest.raises(ValueError, match="in use by process"), alone_in("out", tmp_path):
                pass
            assert (tmp_path / ".lock").read_text().startswith("process")
        assert not list(tmp_path.iterdir())
