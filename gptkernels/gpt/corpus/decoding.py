"""The characters of bytes from the web, whose encoding is named wrongly, or not at all, so often.

UTF-8 is believed before anything that is named: bytes beyond ASCII form valid UTF-8 by chance next
to never. Then come the server's word, the page's own, and what its bytes look like, in the order of
the HTML standard (section 13.2.3.2, "Determining the character encoding"). As there, UTF-16 is not
believed of a page whose name of it could be read as ASCII: it has a byte order mark or NULs.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from typing import Any

from gptkernels.core.optional import optional

UNDECODED = "is in no encoding that can be told"
"""Why a page that `decoded` makes nothing of is malformed."""

_MISSING = "decoding web pages needs the package resiliparse: pip install 'gptkernels[data]'"
_UNREADABLE = 0.01  # of the characters; browsers show as many pages with a few


def decoded(data: bytes, charset: str | None) -> str | None:
    """The text of `data`, with U+FFFD for what cannot be decoded, or None where that, or NUL, is
    more than 1% of it in every encoding. `charset` is the encoding that the server named, if any.

    Raises ImportError where resiliparse is missing.
    """
    if not data.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig")
    encoding = encoding_package()
    may_be_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data
    for name in filter(None, _names(encoding, data, charset)):
        if name.startswith("utf-16") and not may_be_utf16:
            continue
        text: str = encoding.bytes_to_str(data, name, errors="replace", fallback_encodings=())
        if text.count("\ufffd") + text.count("\0") <= _UNREADABLE * len(text):
            return text
    return None


def encoding_package() -> Any:
    """What resiliparse knows of encodings. Raises ImportError, in one sentence, where it is
    missing."""
    return optional("resiliparse.parse.encoding", _MISSING)


def _names(encoding: Any, data: bytes, charset: str | None) -> Iterator[str | None]:
    if charset:
        yield encoding.map_encoding_to_html5(charset.strip("\"' "), fallback_utf8=False)
    yield encoding.detect_encoding(data, from_html_meta=True)
    yield encoding.detect_encoding(data)
