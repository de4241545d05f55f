"""What becomes of one record, as a worker process finds it out: text, filters, fingerprint, ids.

Nothing here knows of another record: whether a text was seen before is for the main process to say
(prepare.py), in the order of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from gptkernels.gpt.corpus import failures
from gptkernels.gpt.corpus.extract import extract
from gptkernels.gpt.corpus.filters import refusal
from gptkernels.gpt.corpus.fingerprints import Fingerprint, fingerprint
from gptkernels.gpt.corpus.packing import pack
from gptkernels.gpt.corpus.pieces import pieces
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.tokenizer import load_tokenizer

Chunk: TypeAlias = list[Record | Malformed]


@dataclass(frozen=True, slots=True)
class Text:
    """A record that passed the filters.

    Fields:
        fingerprint: what its duplicates are found by.
        ids: as bytes of the shards' dtype, without eos.
        characters, utf8_bytes, words: how long the text is.
        continues: as the record has it.
        scored: whether the record has a score.
    """

    fingerprint: Fingerprint
    ids: bytes
    characters: int
    utf8_bytes: int
    words: int
    continues: bool
    scored: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is left out: the name of the reason, and whether the record has a score."""

    reason: str
    scored: bool


Outcome: TypeAlias = Text | Dropped | Malformed


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker has to know: the tokenizer's name, the numbers in a band of a signature (0
    where none is wanted), and the filters' limits."""

    tokenizer: str
    rows: int
    min_score: float
    min_characters: int


class Worker:
    """Works on records. Raises what `load_tokenizer` raises."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tokenizer = load_tokenizer(task.tokenizer, literal=True)
        self._dtype = token_dtype(self._tokenizer.vocab_size)

    def outcome(self, record: Record | Malformed) -> Outcome:
        """What becomes of `record`. Raises ImportError for a package that is missing."""
        if isinstance(record, Malformed):
            return record
        try:
            return self._outcome(record)
        except failures.FATAL:
            raise
        except BaseException as error:
            return failures.malformed(record.name, error)

    def _outcome(self, record: Record) -> Outcome:
        text = extract(record)
        if isinstance(text, Malformed):
            return text
        task, scored = self._task, record.score is not None
        least = 0 if record.continues else task.min_characters  # the end of a long text is short
        reason = refusal(text, record.score, min_score=task.min_score, min_characters=least)
        if reason is not None:
            return Dropped(reason, scored)
        ids, words = bytearray(), 0
        for piece in pieces(text):
            ids += pack(self._dtype, self._tokenizer.encode(piece))
            words += len(piece.split())
        if not ids:  # GPT-1's leaves out control characters, for one
            return Dropped("no token", scored)
        return Text(
            fingerprint(text, task.rows),
            bytes(ids),
            len(text),
            len(text.encode()),
            words,
            record.continues,
            scored,
        )


def token_dtype(vocab_size: int) -> str:
    """The narrowest of the shards' dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def chunks(
    records: Iterable[Record | Malformed], most_records: int, most_bytes: int
) -> Iterator[Chunk]:
    """The records in groups, of at most so many and, but for the last of a group, so many bytes."""
    chunk: Chunk = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.content) if isinstance(record, Record) else 0
        if len(chunk) == most_records or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
