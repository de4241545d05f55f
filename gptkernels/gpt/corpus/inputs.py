"""The files of a corpus: which they are, what identifies them, and their records in one row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptkernels.gpt.corpus import sources
from gptkernels.gpt.corpus import state as states
from gptkernels.gpt.corpus.manifest import Input, is_prepared, sha256
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.sources import Reading


def find(files: Sequence[str | Path], out: Path) -> list[Path]:
    """The files that are named, and those in the folders that are named, at any depth, whose names
    end as those of sources do; in the order of their full names, each once, whichever way it is
    spelled. In folders, hidden files and folders are passed over, and folders that `prepare` writes
    or has written, as is `out`.

    Raises FileNotFoundError for one that is not there, ValueError for none, for a folder that holds
    none, for a file of another kind and for a Git LFS pointer, and ImportError for a package that
    reading one of them needs.
    """
    if not files:
        raise ValueError("files: no file was given, at least one is wanted")
    found: list[Path] = []
    out = out.resolve()
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"files: {file} does not exist")
        inside = [file]
        if file.is_dir():
            inside = list(_sources_in(file, out))
            if not inside:
                raise ValueError(f"files: {file} holds no file that ends with {sources.kinds()}")
        elif not sources.is_source(file):
            raise ValueError(f"files: {file} is of no kind that is read: {sources.kinds()}")
        found += inside
    found.sort(key=lambda path: Path(os.path.abspath(path)).as_posix())
    once = list({path.resolve(): path for path in reversed(found)}.values())[::-1]
    for path in once:
        sources.check(path)
    return once


def describe(paths: Sequence[Path]) -> tuple[Input, ...]:
    """What identifies the files. Every byte is read: that is little beside the rest of the work,
    and nothing less proves that a run goes on with the same."""
    return tuple(Input(path.as_posix(), path.stat().st_size, sha256(path)) for path in paths)


class Reader:
    """The records of `inputs`, one file after the other, each read as `reading` says.

    total: the bytes of all files.
    """

    def __init__(self, inputs: Sequence[Input], reading: Reading) -> None:
        self._inputs, self._reading = inputs, reading
        self.total = sum(file.bytes for file in inputs)
        self._before = self._inside = 0

    def __iter__(self) -> Iterator[Record | Malformed]:
        for file in self._inputs:
            path = Path(file.name)
            for record in sources.read(path, self._reading):
                if isinstance(record, Record):
                    self._inside = min(self._inside + len(record.content), file.bytes)
                yield record
            if path.stat().st_size != file.bytes:
                raise ValueError(f"files: {path} has changed while it was read")
            self._before += file.bytes
            self._inside = 0

    @property
    def done(self) -> int:
        """How many bytes were read. Inside a compressed file that is a guess, by the bytes that
        came out."""
        return self._before + self._inside


def _sources_in(folder: Path, out: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        place = Path(here)
        if place.resolve() == out or is_prepared(place) or (place / states.NAME).exists():
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (place / name for name in names if not name.startswith("."))
        yield from (path for path in paths if sources.is_source(path) and path.is_file())
