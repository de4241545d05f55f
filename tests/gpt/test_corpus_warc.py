"""WARC archives that warcio wrote, read by what the pipeline reads them with, fastwarc."""

from __future__ import annotations

import errno
import gzip
import io
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("fastwarc")
pytest.importorskip("warcio")

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from gptkernels.gpt.corpus import sources, streams, warc
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.sources import Reading

HTML = "text/html; charset=utf-8"
PAGE = "<p>Caf\u00e9".encode()


class Archive:
    """What warcio writes."""

    def __init__(self, *, packed: bool = False) -> None:
        self._out = io.BytesIO()
        self._writer = WARCWriter(self._out, gzip=packed)

    def answer(
        self, payload: bytes, kind: str = HTML, status: str = "200 OK", **headers: str
    ) -> Any:
        lines = [("Content-Type", kind), *((k.replace("_", "-"), v) for k, v in headers.items())]
        return self.record(
            "response", payload, StatusAndHeaders(status, lines, protocol="HTTP/1.1")
        )

    def record(self, kind: str, payload: bytes, http: Any = None, **headers: str) -> Archive:
        self._writer.write_record(
            self._writer.create_warc_record(
                "http://a.org/b",
                kind,
                payload=io.BytesIO(payload),
                http_headers=http,
                warc_content_type=headers.get("content_type", ""),
            )
        )
        return self

    def bytes(self) -> bytes:
        return self._out.getvalue()


def read(folder: Path, content: bytes, name: str = "a.warc", **reading: int) -> list[Any]:
    (folder / name).write_bytes(content)
    found = list(sources.read(folder / name, Reading(**reading)))
    for record in found:
        assert record.name.startswith(str(folder / name))
    return [(record.name[len(str(folder / name)) :], record) for record in found]


def contents(folder: Path, archive: Archive) -> list[Any]:
    return [getattr(record, "content", record) for _, record in read(folder, archive.bytes())]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_pages_of_an_archive(packing: str, tmp_path: Path) -> None:
    archive = Archive(packed=packing == ".gz")
    archive.record("warcinfo", b"software: a\r\n", content_type="application/warc-fields")
    archive.answer(PAGE).answer("caf\u00e9".encode("latin-1"), 'Text/HTML; charset="latin-1"')
    archive.answer(b"<p>x", "application/xhtml+xml").answer(b"plain \xe9", "text/plain")
    archive.record("resource", b"<p>r", content_type="text/html")
    archive.record("conversion", PAGE, content_type="text/plain")
    content = archive.bytes()
    if packing == ".zst":
        content = pytest.importorskip(streams._ZSTD).compress(content)
    found = read(tmp_path, content, f"a.warc{packing}")
    kept = [(name, r.content, r.charset) for name, r in found]
    assert kept == [
        (":2 http://a.org/b", PAGE, "utf-8"),
        (":3 http://a.org/b", b"caf\xe9", '"latin-1"'),
        (":4 http://a.org/b", b"<p>x", None),
        (":5 http://a.org/b", "plain \u00e9", None),
        (":6 http://a.org/b", b"<p>r", None),
        (":7 http://a.org/b", "<p>Caf\u00e9", None),
    ]


def test_what_holds_no_page_is_passed_over(tmp_path: Path) -> None:
    archive = Archive()
    archive.answer(b"<p>gone", status="404 Not Found").answer(b"<p>moved", status="301 Moved")
    archive.answer(b"\x89PNG", "image/png").answer(b"").answer(b"<p>x", "").answer(PAGE)
    archive.record("request", b"GET / HTTP/1.1\r\n\r\n", content_type="application/http")
    archive.record("metadata", b"a: b\r\n", content_type="application/warc-fields")
    archive.record("resource", b"\xff\xd8", content_type="image/jpeg")
    # What is too long, or cut off, counts where it could hold a page.
    archive.record("metadata", b"x" * 200, content_type="text/html")
    archive.record("screenshot", b"<p>of another type", content_type="text/html")
    found = read(tmp_path, archive.bytes(), longest=150)
    assert [(name, record.content) for name, record in found] == [(":6 http://a.org/b", PAGE)]


def test_packed_answers_are_unpacked(tmp_path: Path) -> None:
    archive = Archive()
    archive.answer(gzip.compress(PAGE), Content_Encoding="gzip")
    archive.answer(zlib.compress(PAGE), Content_Encoding="Deflate")
    archive.answer(b"", Content_Encoding="deflate")
    archive.answer(b"3\r\n<p>\r\n2\r\nhi\r\n0\r\n\r\n", Transfer_Encoding="chunked")
    assert contents(tmp_path, archive) == [PAGE, PAGE, b"<p>hi"]


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_packed_answer_that_is_cut_off_is_malformed(
    coding: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    packed = pack(PAGE * 400)
    for cut in (3, 9, len(packed) // 2, len(packed) - 1):
        archive = Archive().answer(packed[:-cut], Content_Encoding=coding).answer(PAGE)
        (_, first), (_, second) = read(tmp_path, archive.bytes())
        assert isinstance(first, Malformed)
        assert first.reason.startswith("holds no answer of a server (")
        assert second.content == PAGE


class Panic(BaseException):
    """As a library written in Rust raises it."""


def test_a_page_that_a_library_stumbles_over_is_malformed_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Archive().answer(PAGE, "text/plain").answer(PAGE).bytes()
    for error in (LookupError("unknown"), Panic("index out of bounds")):
        monkeypatch.setattr(warc, "decoded", Mock(side_effect=error))
        (_, first), (_, second) = read(tmp_path, content)
        assert first.reason == f"cannot be read ({type(error).__name__}: {error})"
        assert second.content == PAGE
    for fatal in (KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "Input/output error")):
        monkeypatch.setattr(warc, "decoded", Mock(side_effect=fatal))
        with pytest.raises(type(fatal)):
            read(tmp_path, content)


@pytest.mark.parametrize(
    "bad",
    [
        {"Content_Encoding": "gzip"},
        {"Content_Encoding": "klingon"},
        {"Transfer_Encoding": "chunked"},
    ],
)
def test_an_answer_that_cannot_be_unpacked_is_malformed(
    bad: dict[str, str], tmp_path: Path
) -> None:
    (_, first), (_, second) = read(tmp_path, Archive().answer(PAGE, **bad).answer(PAGE).bytes())
    assert isinstance(first, Malformed)
    assert first.reason.startswith("holds no answer of a server (")
    assert second.content == PAGE


def test_plain_text_in_no_encoding_is_malformed(tmp_path: Path) -> None:
    archive = Archive().answer(bytes(range(256)) * 4, "text/plain").answer(PAGE)
    (_, first), (_, second) = read(tmp_path, archive.bytes())
    assert first == Malformed(first.name, "is in no encoding that can be told")
    assert second.content == PAGE


def test_a_page_that_is_too_long_is_malformed_packed_or_not(tmp_path: Path) -> None:
    long = b"<p>" + b"x" * 5000
    archive = Archive().answer(long).answer(gzip.compress(long), Content_Encoding="gzip")
    archive.answer(PAGE)
    found = read(tmp_path, archive.bytes(), longest=4000)
    assert [getattr(record, "reason", "") for _, record in found] == [
        "is longer than 4000 bytes",
        "is longer than 4000 bytes",
        "",
    ]


def test_a_page_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    content = Archive().answer(b"<p>" + bytes(8 << 20)).answer(PAGE).bytes()
    (tmp_path / "a.warc").write_bytes(content)
    tracemalloc.start()
    try:
        found = list(sources.read(tmp_path / "a.warc", Reading(longest=1 << 16)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [type(record) for record in found] == [Malformed, Record]
    assert peak < 2 << 20


@pytest.mark.parametrize("packed", [False, True])
def test_pages_before_the_cut_of_an_archive_are_kept(packed: bool, tmp_path: Path) -> None:
    sizes, archive = [0], Archive(packed=packed)
    for _ in range(3):
        sizes.append(len(archive.answer(PAGE * 40).bytes()))
    for cut in range(1, sizes[-1], 7):
        whole = sum(1 for size in sizes[1:] if size <= cut)
        found = read(tmp_path, archive.bytes()[:cut], "a.warc.gz" if packed else "a.warc")
        pages = [record for _, record in found if isinstance(record, Record)]
        assert all(page.content == PAGE * 40 for page in pages)
        # The last page may be there although the line ends, or gzip's sum, after it are not.
        assert whole <= len(pages) <= whole + 1
        if cut not in sizes and (packed or len(pages) == whole):
            assert isinstance(found[-1][1], Malformed)


def test_what_follows_no_record_is_not_read(tmp_path: Path) -> None:
    one = Archive().answer(PAGE).bytes()
    (_, page), (place, bad) = read(tmp_path, one + b"junk" * 20 + b"\r\n" + one)
    assert page.content == PAGE
    assert place == ":2"
    assert bad.reason.startswith("is not a WARC record, nor is what follows (")


@pytest.mark.parametrize("length", [b"99999", b"12345678901234567890123", b"-5", b"many"])
def test_a_record_that_lies_about_its_length_is_malformed(length: bytes, tmp_path: Path) -> None:
    content = Archive().answer(PAGE).bytes()
    before, _, rest = content.partition(b"Content-Length: ")
    content = before + b"Content-Length: " + length + b"\r\n" + rest.partition(b"\r\n")[2]
    found = read(tmp_path, content)
    assert found
    assert all(isinstance(record, Malformed) for _, record in found)


def test_a_disk_that_fails_is_no_malformed_archive() -> None:
    class Failing:
        def read1(self, size: int, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        readline = read1

    with pytest.raises(OSError, match="Input/output error"):
        list(warc.read(Failing(), "a.warc", 100))
