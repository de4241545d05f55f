"""Text files, in records of bounded size: a longer text is cut where a reader would pause."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import Bytes, Damaged

SUFFIXES = (".txt", ".md")
_PAUSES = (b"\n\n", b"\n\r\n", b"\n", b" ")  # the best first


def read(file: Bytes, name: str, piece: int) -> Iterator[Record | Malformed]:
    """The text of `file` in records of at most `piece` bytes of UTF-8 (4 or more).

    Every record but the first `continues` the one before it; joined, they are the file, without the
    byte order mark that some editors put first. A piece that is not UTF-8 is malformed, and the
    record after it begins a text of its own. What comes before damage is read up to its last whole
    character.
    """
    start, continues = 0, False
    for part in _cut(file, piece):
        place = f"{name} from byte {start}" if start else name
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = start + error.start
            yield Malformed(place, f"is not UTF-8 (byte {wrong} cannot be decoded)")
            continues = False
        else:
            text = text if start else text.removeprefix("\ufeff")
            yield Record(place, text, continues=continues)
            continues = True
        start += len(part)


def _cut(file: Bytes, piece: int) -> Iterator[bytes]:
    pending = bytearray()
    try:
        while chunk := file.read1(piece):
            pending += chunk
            while len(pending) > piece:
                end = _end(pending, piece)
                yield bytes(pending[:end])
                del pending[:end]
    except Damaged:
        _, whole = codecs.utf_8_decode(pending, "replace", False)
        if whole:
            yield bytes(pending[:whole])
        raise
    if pending:
        yield bytes(pending)


def _end(text: bytearray, piece: int) -> int:
    """Where to cut off at most `piece` bytes: after the last pause of the best kind that the second
    half of them has, else between two characters."""
    for pause in _PAUSES:
        found = text.rfind(pause, piece // 2, piece)
        if found >= 0:
            return found + len(pause)
    end = piece
    while end > piece - 3 and text[end] & 0xC0 == 0x80:  # UTF-8: not the first byte of a character
        end -= 1
    return end
