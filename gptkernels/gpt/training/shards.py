"""Token shards: binary files of token ids, mapped into memory and read as one sequence.

A shard is nothing but ids, little-endian uint16 or uint32, as nanoGPT's prepare scripts write
them. Nothing is loaded until it is read, so a sequence may be much larger than memory. The size of
a shard is checked before every read: reading past the end of a mapped file that has shrunk kills
the process without a message.

What is no shard mostly reads as one: any bytes are ids. So the first bytes are looked at when a
shard is opened (foreign_bytes.py), and `scan` reads up to 1 GiB for ids past the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptkernels.gpt.training.foreign_bytes import check_shard

# A signed type of the same width, which PyTorch can index, and the mask that makes it unsigned.
_TYPES = {"uint16": (torch.int16, 0xFFFF), "uint32": (torch.int32, 0xFFFFFFFF)}
_DIGESTED = 1 << 20  # bytes at either end of a shard
_PIECE, _SCANNED = 1 << 22, 1 << 30  # bytes: read at once, and read in all, by a scan


class Shards:
    """The ids of `files`, one after the other: a sequence that is read in windows.

    dtype: "uint16" or "uint32". vocab_size: every id that is read must be less.

    Raises FileNotFoundError for a file that is not there and ValueError for a folder, a file that
    is empty, no whole number of ids long or of a kind that its first bytes tell, and for a
    big-endian machine.
    """

    def __init__(self, files: Sequence[str | Path], dtype: str, vocab_size: int) -> None:
        if sys.byteorder != "little":
            raise ValueError("files: token shards are little-endian, and this machine is not")
        self.vocab_size = vocab_size
        self._files = [_Shard(Path(file), dtype) for file in files]
        ends = torch.tensor([len(shard) for shard in self._files]).cumsum(0)
        self._starts = [0, *ends.tolist()]
        self._first, self._last = 0, self._starts[-1]

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, span: slice) -> Shards:
        first, last, _ = span.indices(len(self))
        part = copy.copy(self)
        part._first, part._last = self._first + first, self._first + last
        return part

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` ids from each of `starts` (B,) on: (B, length) int64.

        Raises FileNotFoundError or ValueError for a shard that has gone or changed its size, and
        ValueError for an id that is not in the vocabulary.
        """
        rows = [self._window(self._first + start, length) for start in starts.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64)

    def scan(self) -> None:
        """Raise ValueError for an id past the vocabulary, in all shards together or, where they
        are larger than 1 GiB, in evenly spaced pieces of 4 MiB that add up to it."""
        step = -(-sum(shard.bytes for shard in self._files) // _SCANNED)
        for shard in self._files:
            for largest in shard.largest(step):
                self._check(shard, largest)

    def digest(self) -> str:
        """A fingerprint: of every shard its size, its first and its last bytes."""
        sha = hashlib.sha256()
        for shard in self._files:
            sha.update(shard.digest())
        return sha.hexdigest()

    def _window(self, start: int, length: int) -> Tensor:
        parts = []
        for shard, first, last in zip(self._files, self._starts, self._starts[1:], strict=False):
            low, high = max(start, first), min(start + length, last)
            if low < high:
                ids = shard.read(low - first, high - first)
                self._check(shard, int(ids.max()))
                parts.append(ids)
        return torch.cat(parts)

    def _check(self, shard: _Shard, largest: int) -> None:
        if largest >= self.vocab_size:
            raise ValueError(
                f"files: {shard.path} holds the id {largest}, but the model has "
                f"vocab_size={self.vocab_size} (it was read as {shard.dtype}, see token_dtype)"
            )


class _Shard:
    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self._type, self._mask = _TYPES[dtype]
        self.bytes = self._size()
        check_shard(path, self._type)
        width = self._type.itemsize
        if self.bytes == 0 or self.bytes % width:
            raise ValueError(
                f"files: {path} has {self.bytes} bytes, a whole number of {dtype} ids is wanted"
            )
        self._length = self.bytes // width
        self._mapped: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, last: int) -> Tensor:
        if self._size() != self.bytes:
            raise ValueError(f"files: {self.path} has changed its size while it was in use")
        if self._mapped is None:
            self._mapped = torch.from_file(
                str(self.path), shared=False, size=self._length, dtype=self._type
            )
        return self._mapped[first:last].long() & self._mask

    def largest(self, step: int) -> Iterator[int]:
        """The largest id of every `step`-th piece."""
        lowest = torch.iinfo(self._type).min
        with self.path.open("rb") as file:  # not mapped: it may shrink meanwhile
            for start in range(0, self.bytes, step * _PIECE):
                file.seek(start)
                piece = bytearray(file.read(_PIECE))
                whole = len(piece) - len(piece) % self._type.itemsize
                if whole:
                    # Adding the lowest number puts unsigned numbers in the order of signed ones.
                    ids = torch.frombuffer(
                        piece, dtype=self._type, count=whole // self._type.itemsize
                    )
                    yield int((ids + lowest).max()) - lowest

    def digest(self) -> bytes:
        sha = hashlib.sha256(str(self.bytes).encode())
        with self.path.open("rb") as file:
            sha.update(file.read(_DIGESTED))
            file.seek(max(0, self.bytes - _DIGESTED))
            sha.update(file.read(_DIGESTED))
        return sha.digest()

    def _size(self) -> int:
        if not self.path.exists():
            raise FileNotFoundError(f"files: {self.path} does not exist, a token shard is wanted")
        if not self.path.is_file():
            raise ValueError(f"files: {self.path} is not a file, a token shard is wanted")
        return os.stat(self.path).st_size
