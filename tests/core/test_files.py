"""core.files: a file is the old one or the new one, whoever writes it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

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
