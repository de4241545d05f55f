"""An HTML file: one page, in whatever encoding it has."""

from __future__ import annotations

from collections.abc import Iterator

from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import Bytes

SUFFIXES = (".html", ".htm")


def read(file: Bytes, name: str, longest: int) -> Iterator[Record | Malformed]:
    """The page of `file`, which is at most `longest` bytes long."""
    page = bytearray()
    while chunk := file.read1(longest):
        page += chunk
        if len(page) > longest:
            yield Malformed(name, f"is longer than {longest} bytes")
            return
    if page:
        yield Record(name, bytes(page))
