"""WARC archives (ISO 28500): the pages of web crawls, and the texts made of them (WET).

fastwarc parses them. Each record is read whole before anything in it is looked at, so that one that
is cut off shows; fastwarc would give what there is of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gptkernels.core.optional import optional
from gptkernels.gpt.corpus.decoding import UNDECODED, decoded
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import Bytes

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
    warc = optional("fastwarc.warc", _MISSING)
    kinds = warc.WarcRecordType
    archive = warc.ArchiveIterator(
        _Pieces(file),
        record_types=kinds.response | kinds.resource | kinds.conversion,
        parse_http=False,
        stream_detect=False,
    )
    number = 0
    while True:
        number += 1
        place = f"{name}:{number}"
        try:
            record = next(archive, None)
        except OSError as error:
            if error.errno is not None:  # the disk failed
                raise
            yield Malformed(place, f"is not a WARC record, nor is what follows ({error})")
            return
        if record is None:
            return
        uri = record.headers.get("WARC-Target-URI")
        found = _page(warc, record, f"{place} {uri}" if uri else place, longest)
        if found is not None:
            yield found


def _page(warc: Any, record: Any, place: str, longest: int) -> Record | Malformed | None:
    too_long = Malformed(place, f"is longer than {longest} bytes")
    if record.content_length > longest:
        return too_long
    block = record.reader.read(record.content_length)
    if record.headers.get("Content-Length") != str(len(block)):
        return Malformed(place, "is cut off, or says that it is longer than it is")
    kind, charset, content = record.headers.get("Content-Type", ""), None, block
    if record.record_type == warc.WarcRecordType.response:
        # In a record of its own: where it cannot be parsed, the archive's reader is not touched.
        answer = warc.WarcRecord()
        answer.set_bytes_content(block)
        answer.is_http = True
        try:
            answer.parse_http(auto_decode="all")
            content = answer.reader.read(longest + 1)
        except OSError as error:
            return Malformed(place, f"holds no answer of a server ({error})")
        if len(content) > longest:
            return too_long
        if answer.http_headers.status_code not in range(200, 300):
            return None
        kind, charset = answer.http_content_type or "", answer.http_charset
    kind = kind.partition(";")[0].strip().lower()
    if not content:
        return None
    if kind in _HTML:
        return Record(place, content, charset=charset)
    if kind != _TEXT:
        return None
    text = decoded(content, charset)
    return Malformed(place, UNDECODED) if text is None else Record(place, text)
