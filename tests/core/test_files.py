"""core.files: a file is the old one or the new one, whoever writes it."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from gptkernels.core import files
from gptkernels.core.files import replacing


@pytest.mark.parametrize("how", [{}, {"durable": True}, {"alone": True}])
def test_the_new_file_or_the_old_one(how: dict[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with replacing(path, **how) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(FileNotFoundError), replacing(path, **how) as temporary:
        (temporary.parent / "none" / "half").write_text("half")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(IsADirectoryError, match=r"^\S+ is a folder, a file is wanted$"),
        replacing(tmp_path) as temporary,
    ):
        temporary.touch()
    assert not list(tmp_path.iterdir())


def test_several_writers_at_once(tmp_path: Path) -> None:
    path, failed = tmp_path / "a.txt", []

    def write(number: int) -> None:
        try:
            for _ in range(200):
                with replacing(path) as temporary:
                    temporary.write_text(str(number) * 1000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    text = path.read_text()
    assert text == text[0] * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Windows' rules, played: only what is open for writing is synced, and no folder is opened.
    Returns how long was waited."""
    fsync, opened, waits = os.fsync, os.open, []

    def fsync_of_writers(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def open_of_files(path: Path, flags: int) -> int:
        if path.is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "fsync", fsync_of_writers)
    monkeypatch.setattr(os, "open", open_of_files)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("refusals", [0, 1, 4, 5, 99])
def test_windows_replaces_a_file_once_nobody_has_it_open(
    windows: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    replace, left = os.replace, [refusals]

    def refuses(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(errno.EACCES, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    path = tmp_path / "a.txt"
    path.write_text("old")
    if refusals <= 4:
        with replacing(path, durable=True) as temporary:
            temporary.write_text("new")
    else:
        with (
            pytest.raises(
                PermissionError, match=r"perhaps a program has this file open: \S+a\.txt"
            ),
            replacing(path, durable=True) as temporary,
        ):
            temporary.write_text("new")
    assert path.read_text() == ("new" if refusals <= 4 else "old")
    assert list(tmp_path.iterdir()) == [path]
    assert len(windows) == min(refusals, 4)
    assert sum(windows) <= 1.0 + 1e-9


def test_a_refusal_elsewhere_is_not_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuses)
    monkeypatch.setattr(files.time, "sleep", None)
    with (
        pytest.raises(PermissionError, match="Permission denied: "),
        replacing(tmp_path / "a") as a,
    ):
        a.touch()
