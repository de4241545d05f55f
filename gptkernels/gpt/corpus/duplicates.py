"""Which texts are duplicates of one that came before, with all that came before in a database.

A text is an exact duplicate where its digest was seen, and a near duplicate where its signature
agrees with that of a kept text that it shares a band with, in at least `threshold` of its numbers.
The first in the order of the input is kept.

A band remembers the first text that had it, no later one. So a text is compared with at most as
many others as it has bands, however many pages a site makes of one template; a later text that
resembles two earlier ones is found by the bands that the second did not share with the first.
"""

from __future__ import annotations

import sqlite3
from operator import eq
from typing import Literal

from gptkernels.gpt.corpus.fingerprints import SLOTS, Fingerprint
from gptkernels.gpt.corpus.packing import unpack

_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS signatures (text INTEGER PRIMARY KEY, signature BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS bands (band INTEGER PRIMARY KEY, text INTEGER NOT NULL);
"""


class Duplicates:
    """All texts seen so far, in `database`, whose owner commits.

    threshold: of the estimated resemblance, 0 to 1; only texts with a signature are held to it.
    """

    def __init__(self, database: sqlite3.Connection, threshold: float) -> None:
        database.executescript(_SCHEMA)
        self._database, self._least = database, threshold * SLOTS

    def kind(self, text: Fingerprint) -> Literal["exact duplicate", "near duplicate"] | None:
        """What the next text is, None where it is neither; from now on it was seen."""
        execute = self._database.execute
        new = execute("INSERT OR IGNORE INTO digests VALUES (?)", (text.digest,))
        if not new.rowcount:
            return "exact duplicate"
        if not text.bands:
            return None
        if self._has_resembling(text):
            return "near duplicate"
        row = execute("INSERT INTO signatures (signature) VALUES (?)", (text.signature,)).lastrowid
        self._database.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)", ((band, row) for band in text.bands)
        )
        return None

    def _has_resembling(self, text: Fingerprint) -> bool:
        marks = ", ".join("?" * len(text.bands))
        others = self._database.execute(
            "SELECT signature FROM signatures WHERE text IN "
            f"(SELECT text FROM bands WHERE band IN ({marks}))",
            text.bands,
        )
        own = unpack("uint32", text.signature)
        return any(sum(map(eq, own, unpack("uint32", other))) >= self._least for (other,) in others)
