"""JSON lines: one object a line, which holds a text and perhaps a score."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.streams import Bytes

SUFFIXES = (".jsonl", ".json")
_SKIPPED = 1 << 20  # bytes that are read at once of a line that is too long


def read(
    file: Bytes, name: str, text_key: str, score_key: str, longest: int
) -> Iterator[Record | Malformed]:
    """A record for each line of `file` that is not blank, and is at most `longest` bytes long.

    The text is a string under `text_key`; under `score_key` there may be a number, or null.
    """
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > longest:
            while line and not line.endswith(b"\n"):
                line = file.readline(_SKIPPED)
            yield Malformed(place, f"is longer than {longest} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _record(line, place, text_key, score_key)


def _record(line: bytes, place: str, text_key: str, score_key: str) -> Record | Malformed:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed(place, f"is not UTF-8 (byte {error.start} cannot be decoded)")
    except (ValueError, RecursionError):
        return Malformed(place, "is not JSON")
    if not isinstance(fields, dict):
        return Malformed(place, "is not a JSON object")
    text, score = fields.get(text_key), fields.get(score_key)
    if not isinstance(text, str):
        return Malformed(place, f"has no string under {text_key!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON's \ud800: half a character
        return Malformed(place, f"has half of a surrogate pair under {text_key!r}")
    if score is not None and not _is_number(score):
        return Malformed(place, f"has no finite number under {score_key!r}")
    return Record(place, text, None if score is None else float(score))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past float's range
        return False
