"""`gptkernels overlap`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rbloom")
pytest.importorskip("rich")

from gptkernels.cli import main
from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.prepare import prepare
from gptkernels.gpt.tokenizer import ByteTokenizer

TRAINING = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea."
KNOWN = "call me ISHMAEL some years ago never mind how short it was"  # 9 words of it are there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(TRAINING)
    (folder / "b.txt").write_text("Another text that has nothing to do with the sea at all.")
    files = [folder / "a.txt", folder / "b.txt"]
    prepare(files, folder / "shards", config=PrepareConfig(tokenizer="bytes"), processes=1)
    return folder / "shards"


def run(*words: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main.run(["overlap", *map(str, words)])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_a_table_and_the_same_as_json(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "known.txt").write_text(KNOWN)
    (tmp_path / "[new].txt").write_text("nothing of this is anywhere in the corpus at all")
    files = [tmp_path / "known.txt", tmp_path / "[new].txt"]
    assert run(folder, *files, "--memory", "1", "--json", tmp_path / "rows.json") == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows == [
        {
            "name": str(files[0]),
            "ngrams": 5,
            "found": 2,
            "longest": 9,
            "example": "call me ishmael some years ago never mind how",
            "share": 0.4,
        },
        {
            "name": str(files[1]),
            "ngrams": 3,
            "found": 0,
            "longest": 0,
            "example": "",
            "share": 0.0,
        },
    ]
    assert "40.00%" in printed
    assert "9 words" in printed
    assert "[new].txt" in printed
    assert f"the longest of {files[0]} begins: {rows[0]['example']}" in printed
    assert printed.count("begins:") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one two three four five six seven", "has no text of at least 8 words"),
        ("", "holds no page"),
        (None, "does not exist"),
    ],
)
def test_what_nothing_can_be_said_of_is_refused(
    content: str | None,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    assert run(folder, tmp_path / "a.txt", "--json", tmp_path / "rows.json") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "rows.json").exists()


def test_an_evaluation_is_looked_for_as_the_tokenizer_gives_it_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lowering(ByteTokenizer):
        """Takes accents off, as GPT-1's does."""

        def encode(self, text: str, *, special: bool = True) -> list[int]:
            return super().encode(text.replace("\u00e9", "e"), special=special)

    monkeypatch.setattr("gptkernels.gpt.tokenizer.load_tokenizer", lambda *_, **__: Lowering())
    line = json.dumps({"body": KNOWN.replace("e", "\u00e9")})
    (tmp_path / "known.jsonl").write_text(line)
    words = (folder, tmp_path / "known.jsonl", "--json", tmp_path / "rows.json")
    assert run(*words, "--text-key", "body") == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["ngrams"], row["found"]) == (5, 2)
    assert run(*words) == 2  # there is no text


def test_a_folder_that_was_not_prepared_and_no_evaluation_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tmp_path / "a.txt") == 2
    assert "manifest.json does not exist" in capsys.readouterr().err
    assert run(folder) == 2
    assert "name at least one file" in capsys.readouterr().err
    assert run(folder, tmp_path, "--memory", "0") == 2
    assert "--memory" in capsys.readouterr().err
