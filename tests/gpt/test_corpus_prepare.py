"""`prepare` against a plain pipeline that holds everything in memory: the same bytes, whatever the
number of processes and the chunks, and however often a run is killed."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import json
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from corpus_cases import BYTES, Inline, contents, corpus
from harness import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus import prepare as module
from gptkernels.gpt.corpus import sources, streams
from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.growing import Growing
from gptkernels.gpt.corpus.pieces import pieces
from gptkernels.gpt.corpus.pool import Pool
from gptkernels.gpt.corpus.prepare import prepare
from gptkernels.gpt.corpus.records import Malformed, Record
from gptkernels.gpt.corpus.sources import Reading
from gptkernels.gpt.corpus.state import Progress, State
from gptkernels.gpt.corpus.work import Task, Text
from gptkernels.gpt.corpus.writer import Writer
from gptkernels.gpt.tokenizer import GPT2Tokenizer, load_tokenizer

rensa = pytest.importorskip("rensa")

gpt2 = functools.cache(GPT2Tokenizer)


def plainly(records: list[Record | Malformed], config: PrepareConfig) -> dict[str, Any]:
    """The same, all in memory, without chunks, bands or a database: every text is compared with
    every one before it."""
    tokenizer = load_tokenizer(config.tokenizer, literal=True)
    ids: list[int] = []
    begins: list[int] = []
    dropped: dict[str, int] = {}
    malformed: list[tuple[str, str]] = []
    seen: set[str] = set()
    signatures: list[list[int]] = []

    def reason(record: Record) -> str | None:
        text = record.content
        assert isinstance(text, str)
        if record.score is not None and record.score < config.min_score:
            return "low score"
        if not record.continues and len(text.strip()) < config.min_characters:
            return "too short"
        if not text:
            return "no token"
        if (exact := " ".join(text.split())) in seen:
            return "exact duplicate"
        seen.add(exact)
        words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
        if not config.near_duplicates or len(words) < 5:
            return None
        minhash = rensa.RMinHash(128, 1)
        minhash.update([" ".join(words[i : i + 5]) for i in range(len(words) - 4)])
        own = minhash.digest()
        for other in signatures:
            if sum(map(int.__eq__, own, other)) >= 128 * config.near_duplicates:
                return "near duplicate"
        signatures.append(own)
        return None

    kept_last = False
    for record in records:
        kept = False
        if isinstance(record, Malformed):
            malformed.append((record.name, record.reason))
        elif (why := reason(record)) is not None:
            dropped[why] = dropped.get(why, 0) + 1
        else:
            kept = True
            assert isinstance(record.content, str)
            if not (record.continues and kept_last):
                begins.append(len(ids))
                ids += [] if tokenizer.eos is None else [tokenizer.eos]
            ids += tokenizer.encode(record.content)
        kept_last = kept
    return {"ids": ids, "begins": begins, "dropped": dropped, "malformed": malformed}


def assert_is(folder: Path, wanted: dict[str, Any], config: PrepareConfig) -> None:
    manifest = manifests.read(folder)
    ids, begins, place = [], [], 0
    for shard in manifest.shards:
        content, index = (folder / name for name in (shard.name, shard.index))
        found = memoryview(content.read_bytes()).cast("H").tolist()
        ids += found
        begins += [place + at for at in memoryview(index.read_bytes()).cast("q")]
        place += len(found)
        assert len(found) == shard.tokens == config.shard_tokens or shard == manifest.shards[-1]
    assert ids == wanted["ids"]
    assert begins == wanted["begins"]
    assert manifest.dropped == wanted["dropped"]
    lines = [json.loads(line) for line in (folder / "malformed.jsonl").open()]
    assert [(line["name"], line["reason"]) for line in lines] == wanted["malformed"]
    counts = manifest.counts
    assert (
        counts["records"] == counts["malformed"] + sum(manifest.dropped.values()) + counts["kept"]
    )
    assert counts["documents"] == len(begins)
    assert counts["tokens"] == len(ids)
    assert counts["malformed"] == len(lines)


# ---- the same as a plain pipeline


texts = st.lists(st.sampled_from(["a", "b", "C", "d,", "\n"]), max_size=12).map(" ".join)
scores = st.none() | st.sampled_from([1.0, 3.0, 7.0])
some = st.builds(Record, st.just("r"), texts, scores, st.booleans())
broken = st.builds(Malformed, st.sampled_from(["x", "y"]), st.just("is not JSON"))


@given(
    records=st.lists(some | broken, max_size=30),
    threshold=st.sampled_from([0.0, 1.0]),  # between them bands may miss a pair
    shard_tokens=st.integers(4, 40),
    size=st.integers(1, 7),
)
@settings(max_examples=30, deadline=None)
def test_any_records_become_what_a_plain_pipeline_makes_of_them(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Record | Malformed],
    threshold: float,
    shard_tokens: int,
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "in.txt").write_text("x")
    config = PrepareConfig(tokenizer="bytes", near_duplicates=threshold, shard_tokens=shard_tokens)
    wanted = plainly(records, config)
    with (
        mock.patch("os.fsync"),
        mock.patch.object(module, "Pool", Inline),
        mock.patch.object(sources, "read", return_value=iter(records)),
        mock.patch.object(module, "_CHUNK_RECORDS", size),
        mock.patch.object(module, "_COMMIT_CHUNKS", 2),
    ):
        if wanted["ids"]:
            prepare([folder / "in.txt"], folder / "out", config=config)
            assert_is(folder / "out", wanted, config)
        else:
            with pytest.raises(ValueError, match="nothing is left of what was read: "):
                prepare([folder / "in.txt"], folder / "out", config=config)
            assert not (folder / "out").exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_the_same_bytes_for_any_processes_and_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    folder = corpus(tmp_path / "in", lines=150)
    config = PrepareConfig(tokenizer=tokenizer, shard_tokens=700)
    monkeypatch.setattr(module, "_COMMIT_CHUNKS", 3)
    read, reading = sources.read, Reading(piece=1000)
    monkeypatch.setattr(sources, "read", lambda path, _: read(path, reading))
    made = []
    for processes, size in ((1, 1000), (2, 7), (3, 1)):
        monkeypatch.setattr(module, "_CHUNK_RECORDS", size)
        out = tmp_path / f"out{processes}"
        prepare([folder], out, config=config, processes=processes)
        made.append(contents(out))
    assert made[0] == made[1] == made[2]
    paths = [folder / name for name in ("a.txt", "b.jsonl", "c/d.txt")]
    records = [record for path in paths for record in read(path, reading)]
    assert sum(record.continues for record in records if isinstance(record, Record)) > 2
    assert_is(tmp_path / "out1", plainly(records, config), config)


def test_real_texts_come_back(tmp_path: Path) -> None:
    text = DATA / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip(f"{text} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    (tmp_path / "play.txt").write_bytes(text.read_bytes()[:200_000])
    with mock.patch.object(module, "Pool", Inline):
        manifest = prepare([tmp_path / "play.txt"], tmp_path / "out")
    (shard,) = manifest.shards
    ids = memoryview((tmp_path / "out" / shard.name).read_bytes()).cast("H").tolist()
    tokenizer = GPT2Tokenizer()
    whole = (tmp_path / "play.txt").read_text()
    assert ids == [tokenizer.eos, *tokenizer.encode(whole)]


@given(st.text(alphabet="ab \n'.\u00e9", max_size=60), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(text: str, piece: int) -> None:
    tokenizer = gpt2()
    with (
        mock.patch("gptkernels.gpt.corpus.pieces.PIECE", piece),
        mock.patch("gptkernels.gpt.corpus.pieces._LONGEST", 100),
    ):
        parts = list(pieces(text))
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_the_end_of_a_long_text_is_never_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 20 + "end")
    read, reading = sources.read, Reading(piece=50)
    config = dataclasses.replace(BYTES, min_characters=40)
    with (
        mock.patch.object(module, "Pool", Inline),
        mock.patch.object(sources, "read", lambda path, _: read(path, reading)),
    ):
        manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", config=config)
    assert manifest.dropped == {"exact duplicate": 1}  # the second piece is the first once more
    assert (tmp_path / "out" / "shard_00000.bin").read_bytes()[::2].endswith(b"end")


# ---- folders that are there already


def test_a_finished_folder_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    monkeypatch.setattr(module, "Pool", Inline)
    first = prepare([folder], out, config=BYTES)
    before = contents(out)
    monkeypatch.setattr(module, "Pool", None)  # nothing may work
    assert prepare([folder], out, config=BYTES) == first
    (out / "state.sqlite").write_bytes(b"")  # as a kill between the last two steps leaves it
    assert prepare([folder], out, config=BYTES) == first
    assert contents(out) == before
    with pytest.raises(ValueError, match=r"was begun with min_score 3\.0, not 4\.0; name"):
        prepare([folder], out, config=dataclasses.replace(BYTES, min_score=4.0))
    (folder / "a.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"was begun with another input than \S+a\.txt; name"):
        prepare([folder], out, config=BYTES)


def test_a_run_goes_on_only_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    monkeypatch.setattr(module, "Pool", Inline)
    monkeypatch.setattr(module, "_CHUNK_RECORDS", 10)
    monkeypatch.setattr(module, "_COMMIT_CHUNKS", 1)

    def stop(counts: dict[str, int], done: int, total: int) -> None:
        assert 0 < done <= total
        if counts["records"] >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([folder], out, config=BYTES, observer=stop)
    with pytest.raises(ValueError, match="was begun with shard_tokens 300, not 99; name"):
        prepare([folder], out, config=dataclasses.replace(BYTES, shard_tokens=99))
    with pytest.raises(ValueError, match="was begun with 3 inputs, not 1; name"):
        prepare([folder / "b.jsonl"], out, config=BYTES)
    with (
        mock.patch.object(module, "_versions", return_value={"rensa": "0.1"}),
        pytest.raises(ValueError, match=r"rensa [0-9.]+, not 0\.1 and .+; name another"),
    ):
        prepare([folder], out, config=BYTES)
    shard = out / "shard_00000.bin"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-2])
    with pytest.raises(ValueError, match=rf"bin has {len(kept) - 2} bytes, but {len(kept)} were"):
        prepare([folder], out, config=BYTES)
    shard.write_bytes(kept)
    prepare([folder], out, config=BYTES)
    prepare([folder], tmp_path / "whole", config=BYTES)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_folder_that_lacks_a_part_is_told(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    with mock.patch.object(module, "Pool", Inline):
        prepare([folder], out, config=BYTES)
        index = out / "shard_00001.idx"
        index.write_bytes(index.read_bytes() + b"x")
        with pytest.raises(ValueError, match=r"shard_00001\.idx has \d+ bytes, but its manifest"):
            prepare([folder], out, config=BYTES)
        index.unlink()
        with pytest.raises(FileNotFoundError, match=r"shard_00001\.idx does not exist"):
            prepare([folder], out, config=BYTES)


def test_the_same_inputs_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "Pool", Inline)
    first = prepare([folder, Path("a.txt"), Path("c/../b.jsonl")], out, config=BYTES)
    assert len(first.inputs) == 3
    assert prepare(["."], out, config=BYTES) == first


def test_in_folders_what_is_hidden_or_was_prepared_is_passed_over(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.txt").write_text("an old state")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "manifest.json").write_text('{"text": "of something else"}')
    with mock.patch.object(module, "Pool", Inline):
        prepare([folder], folder / "first", config=BYTES)
        (folder / "begun").mkdir()
        (folder / "begun" / "malformed.jsonl").write_text("{}")
        (folder / "begun" / "state.sqlite").touch()
        manifest = prepare([folder], out, config=BYTES)
    names = [Path(file.name).relative_to(folder).as_posix() for file in manifest.inputs]
    assert names == ["a.txt", "b.jsonl", "c/d.txt", "theirs/manifest.json"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("z.txt.zst", streams._ZSTD), ("z.warc", "fastwarc.warc"), ("z.htm", "resiliparse.parse")],
)
def test_a_missing_package_or_a_pointer_is_told_before_anything_is_read(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corpus(tmp_path / "in")
    (folder / name).write_bytes(b"x")
    monkeypatch.setattr(module, "describe", mock.Mock(side_effect=AssertionError))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "resiliparse.parse.encoding", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'gptkernels\[data\]'"):
        prepare([folder], tmp_path / "out", config=BYTES)
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        prepare([folder], tmp_path / "out", config=BYTES)
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_special_token_in_a_page_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    with mock.patch.object(module, "Pool", Inline):
        manifest = prepare([tmp_path / "a.txt"], tmp_path / "out")
    (shard,) = manifest.shards
    ids = memoryview((tmp_path / "out" / shard.name).read_bytes()).cast("H").tolist()
    assert ids.count(50256) == 1
    assert gpt2().decode(ids[1:]) == "one<|endoftext|>two"
    assert gpt2().encode("<|endoftext|>") == [50256]  # elsewhere it is the token


def test_records_with_a_score_are_counted(tmp_path: Path) -> None:
    lines = ['{"text": "a", "score": 1}', '{"text": "b", "score": 4}', '{"text": "c"}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with mock.patch.object(module, "Pool", Inline):
        counts = prepare([tmp_path / "a.jsonl"], tmp_path / "out", config=BYTES).counts
    assert (counts["records"], counts["scored"], counts["kept"]) == (4, 2, 2)


def test_what_cannot_be_prepared_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for files, into, options, message in (
        ([], out, {}, "no file was given"),
        ([tmp_path / "nothere"], out, {}, "nothere does not exist"),
        ([tmp_path / "empty"], out, {}, "empty holds no file that ends with"),
        ([folder / "c" / "picture.png"], out, {}, "picture.png is of no kind that is read"),
        ([folder], full, {}, "full holds mine.txt, a new or an empty folder is wanted"),
        ([folder], folder / "a.txt", {}, "a.txt is a file"),
        ([folder], out, {"processes": 0}, "processes is 0, at least 1 is wanted"),
        ([folder], out, {"config": PrepareConfig(tokenizer="x")}, "tokenizer name must be"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            prepare(files, into, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"shard_tokens": 0}, "shard_tokens is 0, at least 1"),
        ({"near_duplicates": 1.5}, "near_duplicates is 1.5, 0 or 0.1 to 1"),
        ({"near_duplicates": 0.01}, "near_duplicates is 0.01, 0 or 0.1 to 1"),
        ({"min_score": float("nan")}, "min_score is nan, a finite number"),
        ({"min_characters": -1}, "min_characters is -1, at least 0"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**option)


def test_the_folder_that_is_written_is_no_input(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "in")
    with mock.patch.object(module, "Pool", Inline):
        first = prepare([folder], folder / "out", config=BYTES)
        assert prepare([folder], folder / "out", config=BYTES) == first
    assert len(first.inputs) == 3


@pytest.mark.parametrize("where", ["writing", "committing"])
def test_what_an_interrupted_run_held_is_never_written_later(tmp_path: Path, where: str) -> None:
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    owner, name = {"writing": (Writer, "sync"), "committing": (State, "commit")}[where]
    with mock.patch.object(module, "Pool", Inline):
        with (
            mock.patch.object(owner, name, side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt) as held,
        ):
            prepare([folder], out, config=BYTES)
        prepare([folder], out, config=BYTES)
        whole = contents(out)
        del held  # and with it the files of the run
        gc.collect()
        assert contents(out) == whole
        prepare([folder], tmp_path / "whole", config=BYTES)
    assert contents(tmp_path / "whole") == whole


def test_a_write_that_the_system_takes_in_part_is_gone_on_with(tmp_path: Path) -> None:
    file = Growing(tmp_path / "a", 0)
    whole = file._file

    class Part:
        def write(self, content: memoryview) -> int:
            return whole.write(content[:3])

    with mock.patch.object(file, "_file", Part()):
        file.append(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert file.size == 10
    file.close()


def test_a_commit_follows_the_sync_of_all_that_it_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsynced: set[Path] = set()
    commits = []

    class Watched(Growing):
        def append(self, content: bytes) -> None:
            super().append(content)
            unsynced.add(self._path)

        def sync(self) -> None:
            with mock.patch("os.fsync") as fsync:
                super().sync()
            fsync.assert_called_once_with(self._file.fileno())
            unsynced.discard(self._path)

    class Watching(State):
        def commit(self, progress: Progress) -> None:
            assert not unsynced
            commits.append(progress.counts["kept"])
            super().commit(progress)

    folder = corpus(tmp_path / "in")
    monkeypatch.setattr(module, "Pool", Inline)
    monkeypatch.setattr(module, "_CHUNK_RECORDS", 10)
    monkeypatch.setattr(module, "_COMMIT_CHUNKS", 2)
    monkeypatch.setattr(module, "State", Watching)
    monkeypatch.setattr(module, "Growing", Watched)
    monkeypatch.setattr("gptkernels.gpt.corpus.writer.Growing", Watched)
    manifest = prepare([folder], tmp_path / "out", config=BYTES)
    assert len(commits) > 3
    assert len(manifest.shards) > 1
    assert commits[-1] == manifest.counts["kept"]


# ---- pages that nobody can work on


class Deadly(str):
    """A text that kills whichever process it is sent to."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGKILL,)


TASK = Task("bytes", 0, 3.0, 1)


def test_a_page_that_kills_its_process_is_malformed_and_named() -> None:
    pages = [Record(f"page {i}", Deadly() if i in (3, 4, 11) else f"text {i}") for i in range(14)]
    with Pool(2, TASK) as pool:
        chunks = [pages[:2], pages[2:7], pages[7:9], pages[9:13], pages[13:]]
        outcomes = [outcome for chunk in pool.outcomes(iter(chunks)) for outcome in chunk]
    for page, outcome in zip(pages, outcomes, strict=True):
        if isinstance(page.content, Deadly):
            assert outcome == Malformed(page.name, "ends the process that reads it")
        else:
            assert isinstance(outcome, Text)
            assert outcome.ids[::2] == str(page.content).encode()


def test_processes_that_cannot_start_end_the_run() -> None:
    with (
        Pool(1, dataclasses.replace(TASK, tokenizer="words")) as pool,
        pytest.raises(RuntimeError, match="they end before they have read anything"),
    ):
        next(pool.outcomes([[Record("a", "text")]]))


def test_a_package_that_a_process_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resiliparse.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(1, TASK) as pool, pytest.raises(ImportError, match=r"'gptkernels\[data\]'"):
        next(pool.outcomes([[Record("page", b"<p>text</p>")]]))


class Panic(BaseException):
    """As a library written in Rust raises it."""


@pytest.mark.parametrize("error", [LookupError, Panic])
def test_a_page_that_a_library_stumbles_over_is_malformed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')

    def extract(record: Record) -> Any:
        if record.content == "bad":
            raise error("unknown encoding")
        return record.content

    with (
        mock.patch.object(module, "Pool", Inline),
        mock.patch("gptkernels.gpt.corpus.work.extract", extract),
    ):
        manifest = prepare([tmp_path / "a.jsonl"], tmp_path / "out", config=BYTES)
    assert (manifest.counts["kept"], manifest.counts["malformed"]) == (1, 1)
    line = json.loads((tmp_path / "out" / "malformed.jsonl").read_text())
    assert line["name"].endswith("a.jsonl:2")
    assert line["reason"] == f"cannot be read ({error.__name__}: unknown encoding)"


def test_an_input_that_changes_while_it_is_read_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n')

    def grow(*_: Any) -> Any:
        with path.open("a") as file:
            file.write("more")
        return iter([Record("a", "text")])

    with (
        mock.patch.object(module, "Pool", Inline),
        mock.patch.object(sources, "read", grow),
        pytest.raises(ValueError, match=r"a\.jsonl has changed while it was read"),
    ):
        prepare([path], tmp_path / "out", config=BYTES)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "uint16", 100, [])
    writer.append(b"ab", True)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("os.fsync", side_effect=full),
        pytest.raises(OSError, match=r"No space left on device: .*shard_00000\.bin"),
    ):
        writer.sync()


@pytest.mark.parametrize("call", ["progress", "commit"])
def test_a_database_that_fails_is_told_in_one_sentence(tmp_path: Path, call: str) -> None:
    folder = corpus(tmp_path / "in")
    full = sqlite3.DatabaseError("database or disk is full")
    with (
        mock.patch.object(module, "Pool", Inline),
        mock.patch.object(State, call, side_effect=full),
        pytest.raises(OSError, match=r"out: \S+state\.sqlite: database or disk is full"),
    ):
        prepare([folder], tmp_path / "out", config=BYTES)
