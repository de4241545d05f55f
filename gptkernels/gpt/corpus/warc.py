"""WARC archives (ISO 28500): the pages of web crawls, and the texts made of them (WET).

fastwarc parses them. Each record is read whole before anything in it is looked at, so that one that
is cut off shows; fastwarc would give what there is of it.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any

from gptkernels.core.optional import optional
from gptkernels.gpt.corpus import failures
from gptkernels.gpt.corpus.decoding import UNDECODED, decoded
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import Bytes, Damaged

SUFFIXES = (".warc", ".wet")
_MISSING = "reading WARC archives needs the package fastwarc: pip install 'gptkernels[data]'"
_HTML = ("text/html", "application/xhtml+xml")
_TEXT = "text/plain"


class _Pieces:
    """A stream for fastwarc, which reads far ahead: short pieces, so that damage further on does
    not take along what comes before it."""

    def __init__(self, file: Bytes) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int) -> bytes:
        piece = self._file.read1(size)
        self._position += len(piece)
        return piece

    def tell(self) -> int:
        return self._position


def read(file: Bytes, name: str, longest: int) -> Iterator[Record | Malformed]:
    """The HTML pages and plain texts among the responses, resources and conversions in `file`.

    Other records, other types of content, and answers of a server that are not 2xx hold no page and
    are passed over. A page is at most `longest` bytes long, packed or not.
    """
    warc = warc_package()
    archive = warc.ArchiveIterator(_Pieces(file), parse_http=False, stream_detect=False)
    number = 0
    while True:
        number += 1
        place = f"{name}:{number}"
        try:
            record = next(archive, None)
        except BaseException as error:
            if _is_fatal(error):
                raise
            yield Malformed(place, f"is not a WARC record, nor is what follows ({error})")
            return
        if record is None:
            return
        found: Record | Malformed | None
        try:
            found = _page(warc, record, place, longest)
        except BaseException as error:
            if _is_fatal(error):
                raise
            found = failures.malformed(place, error)
        if found is not None:
            yield found


def warc_package() -> Any:
    """fastwarc's reader. Raises ImportError, in one sentence, where it is missing."""
    return optional("fastwarc.warc", _MISSING)


def _is_fatal(error: BaseException) -> bool:
    """Whether it is no library's: the disk failed, or the bytes cannot be decompressed."""
    failed = isinstance(error, OSError) and error.errno is not None
    return failed or isinstance(error, (Damaged, *failures.FATAL))


def _page(warc: Any, record: Any, place: str, longest: int) -> Record | Malformed | None:
    uri = record.headers.get("WARC-Target-URI")
    place = f"{place} {uri}" if uri else place
    kinds = warc.WarcRecordType
    with_pages = (kinds.response, kinds.resource, kinds.conversion)
    # Of a record that is cut off in its header, the type may not be known.
    if record.record_type not in (*with_pages, kinds.unknown, kinds.no_type):
        return None
    too_long = Malformed(place, f"is longer than {longest} bytes")
    if record.content_length > longest:
        return too_long
    block = record.reader.read(record.content_length)
    if record.headers.get("Content-Length") != str(len(block)):
        return Malformed(place, "is cut off, or says that it is longer than it is")
    if record.record_type not in with_pages:
        return None
    status, kind, charset, content = 200, record.headers.get("Content-Type", ""), None, block
    if record.record_type == kinds.response:
        try:
            status, kind, charset, content = _answer(warc, block, longest)
        except (OSError, EOFError, zlib.error) as error:
            return Malformed(place, f"holds no answer of a server ({error})")
    if len(content) > longest:
        return too_long
    if status not in range(200, 300) or not content:
        return None
    kind = kind.partition(";")[0].strip().lower()
    if kind in _HTML:
        return Record(place, content, charset=charset)
    if kind != _TEXT:
        return None
    text = decoded(content, charset)
    return Malformed(place, UNDECODED) if text is None else Record(place, text)


def _answer(warc: Any, block: bytes, longest: int) -> tuple[int, str, str | None, bytes]:
    """Of a server's answer the status (0 where there is none), type, charset and unpacked content,
    at most `longest` + 1 bytes of it. Raises OSError, EOFError or zlib.error where it is not HTTP,
    or cannot be unpacked to its end."""
    answer = _http(warc, block, "transfer")
    headers = answer.http_headers
    coding = (headers.get("Content-Encoding") or "").strip().lower()
    if coding in ("gzip", "deflate"):
        content = _inflated(coding, answer.reader.read(), longest)
    else:
        content = _http(warc, block, "all").reader.read(longest + 1)
    return headers.status_code or 0, answer.http_content_type or "", answer.http_charset, content


def _http(warc: Any, block: bytes, decode: str) -> Any:
    # In a record of its own: where it cannot be parsed, the archive's reader is not touched.
    answer = warc.WarcRecord()
    answer.set_bytes_content(block)
    answer.is_http = True
    answer.parse_http(auto_decode=decode)
    return answer


def _inflated(coding: str, packed: bytes, longest: int) -> bytes:
    """Python unpacks it, because fastwarc gives what there is of a body that is cut off."""
    if coding == "gzip":
        with gzip.open(io.BytesIO(packed)) as file:
            return file.read(longest + 1)
    body = zlib.decompressobj()
    content = body.decompress(packed, longest + 1)
    if packed and not body.eof and len(content) <= longest:
        raise EOFError("its body is cut off")
    return content
