"""The text of a record: as it is, or the main text of an HTML page, without menus and comments.

docs/data.md compares the libraries that find main texts.
"""

from __future__ import annotations

from gptkernels.core.optional import optional
from gptkernels.gpt.corpus.decoding import UNDECODED, decoded
from gptkernels.gpt.corpus.records import Malformed, Record

_MISSING = "reading HTML needs the package resiliparse: pip install 'gptkernels[data]'"
_DEEPEST = 512  # elements in each other, as in Chromium; resiliparse's time is their number squared
_TOO_DEEP = ">".join("*" * (_DEEPEST + 1))


def extract(record: Record) -> str | Malformed:
    """The text of `record`; of an HTML page the main text, which may be empty.

    Raises ImportError where the record is HTML and resiliparse is missing.
    """
    if isinstance(record.content, str):
        return record.content
    page = decoded(record.content, record.charset)
    if page is None:
        return Malformed(record.name, UNDECODED)
    tree = optional("resiliparse.parse.html", _MISSING).HTMLTree.parse(page)
    if tree.document.query_selector(_TOO_DEEP) is not None:
        return Malformed(record.name, f"has more than {_DEEPEST} elements in each other")
    html2text = optional("resiliparse.extract.html2text", _MISSING)
    text: str = html2text.extract_plain_text(
        tree, main_content=True, alt_texts=False, comments=False, post_meta=False
    )
    return text
