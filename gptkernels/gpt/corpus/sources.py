"""Source files: what can be read, by the name's end, and the records in a file.

A file is read once, from its beginning to its end, and never held whole. The same file gives the
same records, whatever else happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptkernels.core.files import check_no_pointer
from gptkernels.gpt.corpus import html, jsonl, text, warc
from gptkernels.gpt.corpus.decoding import encoding_package
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import COMPRESSIONS, Damaged, check_compression, opened

_FORMATS = (*text.SUFFIXES, *jsonl.SUFFIXES, *html.SUFFIXES, *warc.SUFFIXES)


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    Fields:
        text_key: where a line of JSON has its text.
        score_key: where it may have its score.
        piece: bytes; a text file is cut into records that are no longer.
        longest: bytes; a line of JSON or a page that is longer is malformed.
    """

    text_key: str = "text"
    score_key: str = "score"
    piece: int = 1 << 20
    longest: int = 1 << 26


def kinds() -> str:
    """What a source file's name may end with, in words."""
    return f"{', '.join(_FORMATS)}, each also with {' or '.join(COMPRESSIONS)} after it"


def is_source(path: Path) -> bool:
    """Whether the name of `path` ends as those of source files do."""
    return _format(path) in _FORMATS


def check(path: Path) -> None:
    """Raise what `read` would raise before its first record, or, for a package that is missing,
    anywhere in the file.

    FileNotFoundError for a file that is not there, ValueError for a folder, a name of no known kind
    or a Git LFS pointer, ImportError for a package.
    """
    if not path.exists():
        raise FileNotFoundError(f"sources: {path} does not exist")
    if not path.is_file():
        raise ValueError(f"sources: {path} is not a file")
    if not is_source(path):
        raise ValueError(f"sources: {path} is of no kind that can be read: {kinds()}")
    check_no_pointer(path)
    check_compression(path)
    if _format(path) in warc.SUFFIXES:
        warc.warc_package()
    if _format(path) in (*warc.SUFFIXES, *html.SUFFIXES):
        encoding_package()


def read(path: Path, reading: Reading = Reading()) -> Iterator[Record | Malformed]:
    """The records of `path`, and what is malformed, in the order in which they stand there.

    No content raises anything: what cannot be read is malformed. Raises what `check` raises, and
    OSError where the disk fails.
    """
    check(path)
    return _records(path, reading)


def _records(path: Path, reading: Reading) -> Iterator[Record | Malformed]:
    found = False
    try:
        for record in _undamaged(path, reading):
            found = True
            yield record
    except Damaged as damage:
        yield Malformed(str(path), str(damage))
    else:
        if not found:
            yield Malformed(str(path), "holds no page")


def _undamaged(path: Path, reading: Reading) -> Iterator[Record | Malformed]:
    name, kind = str(path), _format(path)
    with opened(path) as file:
        if kind in text.SUFFIXES:
            yield from text.read(file, name, reading.piece)
        elif kind in jsonl.SUFFIXES:
            yield from jsonl.read(file, name, reading.text_key, reading.score_key, reading.longest)
        elif kind in html.SUFFIXES:
            yield from html.read(file, name, reading.longest)
        else:
            yield from warc.read(file, name, reading.longest)


def _format(path: Path) -> str:
    """The suffix that says the format: ".jsonl" of "pages.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
