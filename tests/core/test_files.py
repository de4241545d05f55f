"""core.files: a file is the old one or the new one, whoever writes it."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from gptkernels.core import files
from gptkernels.core.arguments import new_file, new_folder
from gptkernels.core.files import check_file, check_folder, replacing


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


# ---- what is found out beforehand


def test_what_cannot_be_written_is_found_out_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "a", file / "a" / "b"):
        with pytest.raises(
            NotADirectoryError, match=rf"^out must be a folder, but {file} is a file$"
        ):
            check_folder("out", path)
    with pytest.raises(
        NotADirectoryError, match=r"^the folder of json must be a folder, but \S+ is a file$"
    ):
        check_file("json", file / "a")
    with pytest.raises(IsADirectoryError, match=r"^json: \S+ is a folder, a file is wanted$"):
        check_file("json", tmp_path)
    for path in (file, tmp_path / "new", tmp_path / "a" / "new", Path("new")):
        check_file("json", path)
    for path in (tmp_path, tmp_path / "a" / "new", Path("new"), Path()):
        check_folder("out", path)
    assert list(tmp_path.iterdir()) == [file]
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=rf"^out: {tmp_path} is a folder that may not be"):
        check_folder("out", tmp_path / "a" / "new")
    with pytest.raises(PermissionError, match=rf"^the folder of json: {tmp_path} is a folder that"):
        check_file("json", tmp_path / "new")


@pytest.mark.parametrize("refused", [errno.ENOSPC, errno.EROFS])
def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path, refused: int) -> None:
    path = tmp_path / "a.txt"
    for names in (lambda temporary: (str(temporary),), lambda temporary: ()):
        with pytest.raises(OSError, match=r"a\.txt") as caught, replacing(path) as temporary:
            raise OSError(refused, os.strerror(refused), *names(temporary))
        assert str(caught.value) == str(OSError(refused, os.strerror(refused), str(path)))
    with (
        pytest.raises(FileNotFoundError, match=r"'\S+none/a\.txt'$"),
        replacing(tmp_path / "none" / "a.txt") as temporary,
    ):
        temporary.touch()


def test_a_script_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--out", type=new_folder)
    for option, path in (("--json", tmp_path), ("--out", tmp_path / "file" / "a")):
        with pytest.raises(SystemExit):
            parser.parse_args([option, str(path)])
        assert (
            capsys.readouterr()
            .err.splitlines()[-1]
            .startswith(f"{parser.prog}: error: argument {option}: ")
        )
    found = parser.parse_args(["--json", str(tmp_path / "new"), "--out", str(tmp_path)])
    assert (found.json, found.out) == (tmp_path / "new", tmp_path)
