"""Source files: their records, what is malformed in them, and how much of them is in memory."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.corpus import sources, streams, text
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.sources import Reading


def zstd_compress(content: bytes) -> bytes:
    return importlib.import_module(streams._ZSTD).compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd_compress,
}


@pytest.fixture(params=COMPRESS)
def suffix(request: pytest.FixtureRequest) -> str:
    return of_packages(request.param)


def of_packages(suffix: str) -> str:
    if suffix == ".zst":
        pytest.importorskip(streams._ZSTD)
    return suffix


def records(file: Path, **reading: object) -> list[Record | Malformed]:
    return list(sources.read(file, Reading(**reading)))  # type: ignore[arg-type]


# --- text


class Trickle(io.BytesIO):
    """Gives less than it is asked for, as decompression does."""

    def read1(self, size: int | None = -1, /) -> bytes:
        return super().read1(min(size or 1, 7))


@given(
    st.lists(
        st.sampled_from(["a", "é", "語", "𝄞", " ", "\n", "\r\n", "\n\n", "word"]), max_size=60
    ),
    st.integers(4, 40),
)
def test_pieces_of_a_text_are_the_text(parts: list[str], piece: int) -> None:
    whole = "".join(parts)
    found = list(text.read(io.BytesIO(whole.encode()), "t", piece))
    assert list(text.read(Trickle(whole.encode()), "t", piece)) == found
    assert all(isinstance(record, Record) for record in found)
    assert "".join(record.content for record in found) == whole  # type: ignore[union-attr,misc]
    assert [record.continues for record in found] == [i > 0 for i in range(len(found))]  # type: ignore[union-attr]
    sizes = [len(record.content.encode()) for record in found]  # type: ignore[union-attr]
    assert all(0 < size <= piece for size in sizes)
    # No piece but the last is short without a pause that is better than what follows in it.
    assert all(size > piece // 2 - 4 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("whole", "first"),
    [
        ("One two.\n\nThree\nfour five", "One two.\n\n"),
        ("One two.\r\n\r\nT\r\nfour", "One two.\r\n\r\n"),
        ("One two.\nThree four five", "One two.\n"),
        ("One two three fourfive", "One two three "),
        ("ééééééééééééééé", "éééééééé"),
        ("aééééééééééééééé", "aééééééé"),
        (
            "a\n\nb c d e f g h i j k",
            "a\n\nb c d e f g ",
        ),  # a blank line in the first half is no end
    ],
)
def test_a_text_is_cut_where_a_reader_would_pause(whole: str, first: str) -> None:
    cut = next(text.read(io.BytesIO(whole.encode()), "t", 16))
    assert cut.content == first  # type: ignore[union-attr]


def test_a_text_is_read_as_train_reads_it(tmp_path: Path, suffix: str) -> None:
    content = "\ufeffCaf\u00e9\r\n\0\ufeff".encode()
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](content))
    (record,) = records(tmp_path / f"a.txt{suffix}")
    assert record == Record(str(tmp_path / f"a.txt{suffix}"), "Caf\u00e9\r\n\0\ufeff")


def test_a_piece_that_is_not_utf8_is_malformed_and_the_next_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_bytes(b"good one\n" + b"caf\xe9 bad\n" + b"good two\n" + b"and more\n")
    found = records(file, piece=9)
    assert found == [
        Record(str(file), "good one\n"),
        Malformed(f"{file} from byte 9", "is not UTF-8 (byte 12 cannot be decoded)"),
        Record(f"{file} from byte 18", "good two\n"),
        Record(f"{file} from byte 27", "and more\n", continues=True),
    ]


# --- JSON lines


def test_lines_of_json(tmp_path: Path, suffix: str) -> None:
    lines = [
        '\ufeff{"text": "one", "score": 3}',
        '{"text": "two\\n\\u00e9 \\ud834\\udd1e", "score": 2.5, "more": [1]}\r',
        "  ",
        '{"score": null, "text": ""}',
    ]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert records(file) == [
        Record(f"{file}:1", "one", 3.0),
        Record(f"{file}:2", "two\né 𝄞", 2.5),
        Record(f"{file}:4", ""),
    ]


def test_the_keys_of_json_are_options(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"text": 0, "score": "high", "body": "one", "karma": 4}\n')
    assert records(file, text_key="body", score_key="karma") == [Record(f"{file}:1", "one", 4.0)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "is not JSON"),  # Python refuses so many digits
        (b'"text"', "is not a JSON object"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 (byte 13 cannot be decoded)"),
        (b'{"content": "a"}', "has no string under 'text'"),
        (b'{"text": null}', "has no string under 'text'"),
        (b'{"text": "\\ud834"}', "has half of a surrogate pair under 'text'"),
        (b'{"text": "a", "score": "3"}', "has no finite number under 'score'"),
        (b'{"text": "a", "score": true}', "has no finite number under 'score'"),
        (b'{"text": "a", "score": NaN}', "has no finite number under 'score'"),
        (b'{"text": "a", "score": 1e999}', "has no finite number under 'score'"),
        (b'{"text": "a", "score": 1' + b"0" * 400 + b"}", "has no finite number under 'score'"),
    ],
)
def test_a_malformed_line_is_named_and_the_next_is_read(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert records(file) == [
        Record(f"{file}:1", "a"),
        Malformed(f"{file}:2", reason),
        Record(f"{file}:3", "b"),
    ]


def test_a_line_that_is_too_long_is_passed_over_without_being_held(tmp_path: Path) -> None:
    file, longest, line = tmp_path / "a.jsonl", 1 << 16, 16 << 20
    with file.open("wb") as out:
        out.write(b'{"text": "a"}\n{"text": "' + b"x" * line + b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    try:
        found = records(file, longest=longest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [
        Record(f"{file}:1", "a"),
        Malformed(f"{file}:2", f"is longer than {longest} bytes"),
        Record(f"{file}:3", "b"),
    ]
    assert peak < line // 4
    # The limit is the line's with its end; a line of just that length is read.
    file.write_bytes(b'{"text": "abc"}\n')
    assert records(file, longest=16) == [Record(f"{file}:1", "abc")]
    assert isinstance(records(file, longest=15)[0], Malformed)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.gz"])
def test_a_file_is_never_held_whole(name: str, tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    size = len(line) * 16_000
    file = tmp_path / name
    with gzip.open(file, "wb", 1) if name.endswith("gz") else file.open("wb") as out:
        for _ in range(160):
            out.write(line * 100)
    tracemalloc.start()
    try:
        count = sum(1 for _ in sources.read(file, Reading(piece=1 << 16)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count >= min(16_000, size >> 16)
    assert peak < size // 16


# --- HTML


def test_a_page_is_a_file(tmp_path: Path, suffix: str) -> None:
    file, page = tmp_path / f"a.HTM{suffix}", b"<p>caf\xe9"
    file.write_bytes(COMPRESS[suffix](page))
    assert records(file) == [Record(str(file), page)]
    assert records(file, longest=len(page)) == [Record(str(file), page)]
    assert records(file, longest=6) == [Malformed(str(file), "is longer than 6 bytes")]


# --- files


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.html", "a.warc"])
def test_an_empty_file_is_malformed(name: str, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / (name + suffix)
    file.write_bytes(COMPRESS[suffix](b""))
    assert records(file) == [Malformed(str(file), "holds no page")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 9, 2000])
def test_what_comes_before_the_cut_of_a_file_is_kept(cut: int, suffix: str, tmp_path: Path) -> None:
    of_packages(suffix)
    lines = [json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(4000)]
    parts = [b"".join(lines[i : i + 100]) for i in range(0, 4000, 100)]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(b"".join(map(COMPRESS[suffix], parts))[:-cut])
    *kept, last = records(file)
    assert isinstance(last, Malformed)
    assert last.name == str(file)
    assert last.reason.startswith("cannot be decompressed from here on (")
    whole = [Record(f"{file}:{i}", json.loads(line)["text"]) for i, line in enumerate(lines, 1)]
    assert kept == whole[: len(kept)]
    assert len(kept) > 3000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 10])
def test_a_text_is_read_up_to_the_cut(cut: int, suffix: str, tmp_path: Path) -> None:
    of_packages(suffix)
    draw, file = random.Random(cut), tmp_path / f"a.txt{suffix}"
    whole = "".join(draw.choices("aé語𝄞 \n", k=3000))
    # Two members, or frames: the first is whole, and ends inside a character.
    content = ("x" * cut + whole).encode()
    half = 5000
    packed = [COMPRESS[suffix](part) for part in (content[:half], content[half:])]
    file.write_bytes(packed[0] + packed[1][:-cut])
    *kept, last = records(file, piece=700)
    assert isinstance(last, Malformed)
    assert last.reason.startswith("cannot be decompressed from here on (")
    assert all(isinstance(record, Record) for record in kept)
    text = "".join(record.content for record in kept)  # type: ignore[union-attr,misc]
    assert content.decode().startswith(text)
    assert len(text.encode()) > half - 4


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("place", [20, 9000])  # gzip finds no code that it knows, or a wrong sum
def test_wrong_bytes_inside_a_compressed_file_end_it(
    place: int, suffix: str, tmp_path: Path
) -> None:
    of_packages(suffix)
    draw = random.Random(0)
    lines = [json.dumps({"text": str(draw.getrandbits(900))}).encode() + b"\n" for _ in range(800)]
    content = bytearray(COMPRESS[suffix](b"".join(lines)))
    content[place : place + 40] = bytes(40)
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content)
    *_, last = records(file)
    assert isinstance(last, Malformed)
    assert last.reason.startswith("cannot be decompressed from here on (")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_file_that_was_not_compressed_is_malformed(name: str, tmp_path: Path) -> None:
    of_packages(Path(name).suffix)
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * 100)
    (found,) = records(tmp_path / name)
    assert isinstance(found, Malformed)
    assert "cannot be decompressed" in found.reason


def test_what_is_no_source_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, error, message in (
        ("gone.txt", FileNotFoundError, r"gone\.txt does not exist"),
        (".", ValueError, r"is not a file"),
        ("a.pdf", ValueError, r"a\.pdf is of no kind that can be read: \.txt, .* with \.gz or"),
        ("a.txt", ValueError, r"Git LFS pointer"),
    ):
        with pytest.raises(error, match=message):  # before the first record is asked for
            sources.read(tmp_path / name)


def test_names_of_sources() -> None:
    for name in ("a.txt", "a.MD", "a.b.jsonl.gz", "a.json.ZST", "a.htm", "a.warc.gz", "a.warc.wet"):
        assert sources.is_source(Path(name))
    for name in ("a", ".txt", "a.gz", "a.txt.bz2", "a.txt.gz.gz", "txt", "a.csv"):
        assert not sources.is_source(Path(name))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, module in (("a.txt.zst", streams._ZSTD), ("a.warc", "fastwarc.warc")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ImportError, match=r"pip install 'gptkernels\[data\]'"):
            records(tmp_path / name)
