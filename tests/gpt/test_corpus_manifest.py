"""Prepared shards and their manifest: written, read back, and held to it before any training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import SHORT, TINY, Interrupted, assert_same_bits, interrupt_at

from gptkernels.gpt.corpus import documents as reading
from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus.documents import Part
from gptkernels.gpt.corpus.manifest import Input, Manifest, Shard
from gptkernels.gpt.corpus.packing import pack
from gptkernels.gpt.corpus.writer import Writer
from gptkernels.gpt.tokenizer import ByteTokenizer, GPT2Tokenizer
from gptkernels.gpt.training import data, prepared
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.train import resume, train

TEXTS = [f"It is truth number {i}, universally acknowledged.\n" for i in range(60)]


def manifest_of(folder: Path, lengths: list[list[int]], **fields: Any) -> Manifest:
    """For the shards in `folder`, whatever is in them."""
    shards = []
    for place, (tokens, documents) in enumerate(lengths):
        ids, index = (folder / f"shard_{place:05d}.{end}" for end in ("bin", "idx"))
        sums = manifests.sha256(ids), manifests.sha256(index)
        shards.append(Shard(ids.name, tokens, documents, *sums))
    found = Manifest(
        tokenizer="bytes",
        vocab_size=256,
        token_dtype="uint16",
        eos=None,
        counts={},
        dropped={},
        shards=tuple(shards),
        inputs=(Input("a.txt", 3, "0"),),
        options={},
        versions={},
    )
    return dataclasses.replace(found, **fields)


def write(
    folder: Path, documents: list[list[int]], shard_tokens: int, dtype: str = "uint16"
) -> Manifest:
    writer = Writer(folder, dtype, shard_tokens, [])
    for ids in documents:
        writer.append(pack(dtype, ids), True)
    writer.close()
    manifest = manifest_of(folder, writer.lengths, token_dtype=dtype)
    manifests.write(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of bytes, two of them full."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder, [list(text.encode()) for text in TEXTS], 1200)
    assert len(list(folder.glob("*.bin"))) == 3
    return folder


@given(
    documents=st.lists(st.lists(st.integers(0, 70000), min_size=1, max_size=12), max_size=12),
    shard_tokens=st.integers(1, 20),
    part=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_documents_come_back_however_shards_cut_them(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard_tokens: int,
    part: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with mock.patch("os.fsync"):  # the slowest part by far
        written = write(folder, documents, shard_tokens, "uint32")
    manifest = manifests.read(folder)
    assert manifest == written
    with mock.patch.object(reading, "_PART", part):
        found: list[list[int]] = []
        for begins, ids in reading._runs(folder, manifest):
            assert len(ids) <= part
            if begins:
                found.append([])
            found[-1] += ids
    assert found == documents
    tokens = sum(map(len, documents))
    assert sum(shard.tokens for shard in manifest.shards) == tokens
    assert all(shard.tokens == shard_tokens for shard in manifest.shards[:-1])
    assert sum(shard.documents for shard in manifest.shards) == len(documents)
    shutil.rmtree(folder)


def test_texts_come_back(folder: Path) -> None:
    assert list(reading.texts(folder)) == [Part(text) for text in TEXTS]


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer, GPT2Tokenizer])
def test_a_long_text_comes_back_in_parts(
    tokenizer: type[ByteTokenizer | GPT2Tokenizer], size: int, tmp_path: Path
) -> None:
    texts = ["one two three\nfour \U0001d11e five " * 9 + "end", "語" * 50, "six seven"]
    of = tokenizer()
    ids = [[*([] if of.eos is None else [of.eos]), *of.encode(text)] for text in texts]
    written = write(tmp_path, ids, 70)
    name = "bytes" if of.eos is None else "gpt2"
    written = dataclasses.replace(written, tokenizer=name, eos=of.eos)
    manifests.write(tmp_path, written)
    with mock.patch.object(reading, "_PART", size):
        parts = list(reading.texts(tmp_path))
    documents: list[list[str]] = []
    for part in parts:
        if not part.continues:
            documents.append([])
        documents[-1].append(part.text)
    assert "".join(documents[-1]) == texts[-1]
    whole = (part.text for part in parts if not {"語", "\ufffd"} & set(part.text))
    assert all(len(of.encode(text)) <= 3 * size for text in whole)
    if size == 10:  # each part has a space, and only what has none is cut anywhere
        assert "".join(documents[0]) == texts[0]
        assert len(documents[0]) > 3
        assert all(part[0].isspace() for part in documents[0][1:])


def test_a_shard_is_ids_alone_and_an_index_places_alone(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3], [4, 500]], 4)
    assert (tmp_path / "shard_00000.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    assert (tmp_path / "shard_00000.idx").read_bytes() == bytes(8) + bytes([3, *bytes(7)])
    assert (tmp_path / "shard_00001.bin").read_bytes() == bytes([244, 1])
    assert (tmp_path / "shard_00001.idx").read_bytes() == b""


# ---- what train takes from a manifest


def test_a_folder_is_its_shards_in_order(folder: Path) -> None:
    config = prepared.settled([folder], TrainConfig())
    assert (config.tokenizer, config.token_dtype) == ("bytes", "uint16")
    tokens, digest = data.read([folder], ByteTokenizer(), "uint16", 256)
    shards = sorted(folder.glob("*.bin"))
    named, same = data.read(shards, ByteTokenizer(), "uint16", 256)
    assert digest == same
    assert len(tokens) == len(named) == len("".join(TEXTS))
    joined = b"".join(shard.read_bytes() for shard in shards)
    assert joined[::2] == "".join(TEXTS).encode()


def test_files_without_a_manifest_are_bytes_and_uint16(tmp_path: Path) -> None:
    config = prepared.settled([tmp_path / "a.txt"], TrainConfig())
    assert (config.tokenizer, config.token_dtype) == ("bytes", "uint16")
    given = TrainConfig(tokenizer="gpt2", token_dtype="uint32")
    assert prepared.settled([tmp_path / "a.bin"], given) == given


def test_another_tokenizer_than_bytes_is_for_where_none_is_said(
    folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    assert prepared.settled([text], TrainConfig(), tokenizer="gpt2").tokenizer == "gpt2"
    named = TrainConfig(tokenizer="bytes")
    assert prepared.settled([text], named, tokenizer="gpt2").tokenizer == "bytes"
    assert prepared.settled([folder], TrainConfig(), tokenizer="gpt2").tokenizer == "bytes"


def test_what_contradicts_a_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    for setting in ({"tokenizer": "gpt2"}, {"token_dtype": "uint32"}):
        ((name, value),) = setting.items()
        for files in ([folder], [folder / "shard_00001.bin"]):
            with pytest.raises(ValueError, match=rf"{name} is '{value}', but \S+manifest.json say"):
                prepared.settled(files, TrainConfig(**setting))
    other = tmp_path / "other"
    other.mkdir()
    write(other, [[1, 2]], 10, "uint32")
    with pytest.raises(ValueError, match=r"token_dtype is 'uint16', but .*other.* says 'uint32'"):
        prepared.settled([folder, other], TrainConfig())


def test_training_on_a_folder_goes_on_after_an_interruption(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    whole = train([folder], tmp_path / "whole", model=TINY, config=SHORT)
    with pytest.raises(Interrupted):
        train([folder], tmp_path / "cut", model=TINY, config=SHORT, observer=interrupt_at(8))
    again = resume(tmp_path / "cut")
    assert_same_bits(whole.model.state_dict(), again.model.state_dict())
    (folder / "shard_00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00002\.bin does not exist, but its man"):
        resume(tmp_path / "cut", steps=20)


# ---- what it refuses


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_an_id_past_the_vocabulary(folder: Path) -> None:
    path = folder / "shard_00001.bin"
    path.write_bytes(path.read_bytes()[:-2] + pack("uint16", [256]))
    lengths = [[shard.tokens, shard.documents] for shard in manifests.read(folder).shards]
    manifests.write(folder, manifest_of(folder, lengths))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "shard_00001.bin").unlink(), r"shard_00001.bin does not exist, but"),
    "shorter": (
        lambda f: (f / "shard_00001.bin").write_bytes(b"ab"),
        r"shard_00001.bin has 2 bytes, but its manifest says 2400",
    ),
    "another bit": (lambda f: flip(f / "shard_00002.bin"), r"shard_00002.bin has another sha256"),
    "two shards exchanged": (
        lambda f: (
            (f / "shard_00000.bin").rename(f / "x"),
            (f / "shard_00001.bin").rename(f / "shard_00000.bin"),
            (f / "x").rename(f / "shard_00001.bin"),
        ),
        r"shard_00000.bin has another sha256",
    ),
    "an id past the vocabulary": (
        with_an_id_past_the_vocabulary,
        r"shard_00001.bin holds the id 256, but the model has vocab_size=256",
    ),
    "another vocabulary": (
        lambda f: edit(f, lambda m: m.update(vocab_size=300)),
        "manifest.json says vocab_size=300, but the tokenizer 'bytes' has 256 tokens",
    ),
    "cut off": (
        lambda f: (f / "manifest.json").write_text('{"format": "gptk'),
        "manifest.json is not JSON",
    ),
    "not UTF-8": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{"),
        "manifest.json is not JSON",
    ),
    "another file": (
        lambda f: (f / "manifest.json").write_text('{"name": "app"}'),
        "manifest.json is not a manifest of prepared shards",
    ),
    "another version": (
        lambda f: edit(f, lambda m: m.update(version=2)),
        "manifest.json has version 2, this package reads version 1",
    ),
    "a field missing": (
        lambda f: edit(f, lambda m: m.pop("eos")),
        "manifest.json must hold tokenizer, vocab_size",
    ),
    "a wrong type": (
        lambda f: edit(f, lambda m: m.update(vocab_size="256")),
        "manifest.json must hold int as its vocab_size, got '256'",
    ),
    "no list": (lambda f: edit(f, lambda m: m.update(shards={})), "must hold a list as its shards"),
    "a shard without a sum": (
        lambda f: edit(f, lambda m: m["shards"][1].pop("sha256")),
        "each of its shards must hold name, tokens",
    ),
    "another dtype": (
        lambda f: edit(f, lambda m: m.update(token_dtype="int8")),
        "has the token_dtype 'int8', uint16 or uint32 is wanted",
    ),
    "a path out of the folder": (
        lambda f: edit(f, lambda m: m["shards"][0].update(name="../shard_00000.bin")),
        r"must hold names of files as its shards, got '../shard_00000.bin'",
    ),
    "no shards": (
        lambda f: edit(f, lambda m: m.update(shards=[])),
        "is not among the shards that .*manifest.json names",
    ),
    "not finished": (
        lambda f: (f / "manifest.json").rename(f / "state.sqlite"),
        "is not finished, go on with gptkernels prepare",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_train_refuses(folder: Path, tmp_path: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train([folder], tmp_path / "run", model=TINY, config=SHORT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_shard_named_alone_is_held_to_the_manifest_beside_it(folder: Path) -> None:
    flip(folder / "shard_00000.bin")
    data.read([folder / "shard_00001.bin"], ByteTokenizer(), "uint16", 256)
    with pytest.raises(ValueError, match="another sha256"):
        data.read([folder / "shard_00000.bin"], ByteTokenizer(), "uint16", 256)
    (folder / "mine.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"mine\.bin is not among the shards"):
        data.read([folder / "mine.bin"], ByteTokenizer(), "uint16", 256)
    (folder / "text.txt").write_text("A text beside a manifest is a text.")
    data.read([folder / "text.txt"], ByteTokenizer(), "uint16", 256)


def test_documents_are_held_to_the_manifest_too(folder: Path) -> None:
    index = folder / "shard_00001.idx"
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(ValueError, match=r"shard_00001\.idx has another sha256"):
        list(reading.texts(folder))
