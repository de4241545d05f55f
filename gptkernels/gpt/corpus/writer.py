"""Writes documents into shards, of a bounded number of tokens each, and the index beside each.

A document that does not fit goes on in the next shard, so that every shard but the last is full;
the index has the place where it begins, in the shard where that is.
"""

from __future__ import annotations

from pathlib import Path

from gptkernels.gpt.corpus.growing import Growing
from gptkernels.gpt.corpus.packing import WIDTHS, pack


class Writer:
    """Appends to the shards in `folder`.

    shard_tokens: of a full shard. lengths: tokens and documents of each shard that was begun
    before; what the files hold beyond them, a killed process left, and it is cut off.

    Raises ValueError where the files hold less.
    """

    def __init__(
        self, folder: Path, token_dtype: str, shard_tokens: int, lengths: list[list[int]]
    ) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, token_dtype, shard_tokens
        self._full: list[list[int]] = []
        first, *others = lengths or [[0, 0]]
        self._open(*first)
        for tokens, documents in others:
            self._next(tokens, documents)

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens and documents of each shard."""
        return [*self._full, [self._tokens, self._documents]]

    def append(self, ids: bytes, begins: bool) -> None:
        """Write ids, of the shards' dtype; with `begins`, a document begins with the first."""
        while ids:
            if self._tokens == self._shard_tokens:
                self._next(0, 0)
            if begins:
                self._index.append(pack("int64", [self._tokens]))
                self._documents += 1
                begins = False
            fitting = ids[: (self._shard_tokens - self._tokens) * WIDTHS[self._dtype]]
            self._ids.append(fitting)
            self._tokens += len(fitting) // WIDTHS[self._dtype]
            ids = ids[len(fitting) :]

    def sync(self) -> None:
        """All that was appended survives the process."""
        self._ids.sync()
        self._index.sync()

    def close(self) -> None:
        """Sync and close."""
        self._ids.close()
        self._index.close()

    def _next(self, tokens: int, documents: int) -> None:
        self.close()
        self._full.append([self._tokens, self._documents])
        self._open(tokens, documents)

    def _open(self, tokens: int, documents: int) -> None:
        name = shard_name(len(self._full))
        self._ids = Growing(self._folder / f"{name}.bin", tokens * WIDTHS[self._dtype])
        self._index = Growing(self._folder / f"{name}.idx", documents * WIDTHS["int64"])
        self._tokens, self._documents = tokens, documents


def shard_name(place: int) -> str:
    """The name of the shard at `place`, counted from 0, without a suffix."""
    return f"shard_{place:05d}"
