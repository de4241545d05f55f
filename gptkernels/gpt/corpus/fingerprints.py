"""What duplicates are found by: a text's digest, and its MinHash signature cut into bands.

    digest       BLAKE2b of the text in NFC, each run of white space as one space: two texts with
                 one digest are exact duplicates
    shingles     every 5 words in a row, lower-cased, without punctuation. The resemblance of two
                 texts is that of their sets of shingles, |A and B| / |A or B|
    signature    128 numbers. Each is the least hash of the shingles under another hash function,
                 so the share of equal numbers estimates the resemblance
                 (Broder, "On the resemblance and containment of documents", 1997)
    bands        the signature in groups of r numbers. Texts that resemble each other by s share at
                 least one of b groups with probability 1 - (1 - s^r)^b
                 (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4)

Words in a row, because texts about one thing share words, but hardly five in a row; five, because
a word that was changed then takes only five shingles along. FineWeb uses the same. A text of fewer
words has no signature: only its digest can tell it is a duplicate.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from gptkernels.core.optional import optional
from gptkernels.gpt.corpus.packing import WIDTHS, pack
from gptkernels.gpt.corpus.pieces import pieces

SHINGLE = 5  # words
SLOTS = 128  # numbers of a signature
_RECALL = 0.99  # of the pairs exactly at the threshold, how many share a band at least
_SEED = 1
_MISSING = "near duplicates are found by the package rensa: pip install 'gptkernels[data]'"

# Chinese and Japanese put no space between words: each of their characters counts as a word.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is kept of a text to find its duplicates.

    Fields:
        digest: 16 bytes.
        signature: the 128 numbers, little-endian uint32; empty where the text has no shingle.
        bands: a number for each band, of 64 bits with a sign, which texts of one band share.
    """

    digest: bytes
    signature: bytes = b""
    bands: tuple[int, ...] = ()


def fingerprint(text: str, rows: int) -> Fingerprint:
    """That of `text`, with bands of `rows` numbers; where that is 0, its digest alone.

    Raises ImportError where rensa is missing and needed.
    """
    normal = unicodedata.normalize("NFC", text)
    digest = _digest(normal)
    signature = _signature(normal) if rows else b""
    return Fingerprint(digest, signature, _bands(signature, rows) if signature else ())


def rows_of_bands(threshold: float) -> int:
    """How many numbers a band has: as many as leave pairs that resemble each other by `threshold`
    a chance of 99 % to share one. Longer bands have fewer dissimilar texts in common."""
    for rows in range(SLOTS, 1, -1):
        if 1 - (1 - threshold**rows) ** (SLOTS // rows) >= _RECALL:
            return rows
    return 1


def rensa_package() -> Any:
    """The package rensa. Raises ImportError, in one sentence, where it is missing."""
    return optional("rensa", _MISSING)


def _digest(normal: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces(normal):
        for word in piece.split():
            digest.update(b" %b" % word.encode())
    return digest.digest()


def _signature(normal: str) -> bytes:
    minhash = rensa_package().RMinHash(num_perm=SLOTS, seed=_SEED)
    words: list[str] = []
    shingles = 0
    for piece in pieces(normal):
        words = words[1 - SHINGLE :] + _WORD.findall(piece.lower())
        found = [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]
        minhash.update(found)
        shingles += len(found)
    return pack("uint32", minhash.digest()) if shingles else b""


def _bands(signature: bytes, rows: int) -> tuple[int, ...]:
    size = rows * WIDTHS["uint32"]
    # The place is hashed too: equal numbers in different bands have nothing to do with each other.
    return tuple(
        int.from_bytes(
            hashlib.blake2b(signature[i : i + size], digest_size=8, salt=i.to_bytes(8)).digest(),
            "little",
            signed=True,
        )
        for i in range(0, len(signature) - size + 1, size)
    )
