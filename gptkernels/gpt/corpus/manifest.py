"""manifest.json: what a folder of prepared shards holds, and whether it still holds that.

    shard_00000.bin     ids, little-endian, of the width that token_dtype says
    shard_00000.idx     where documents begin in it: little-endian int64, counted in tokens
    manifest.json       names both, with their sizes and sums; written last, so a folder that has
                        one is finished

It says nothing of when, where or by how many processes it was made: whoever makes the shards again
from the same inputs gets the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptkernels.core.files import replacing
from gptkernels.gpt.corpus.packing import WIDTHS

NAME = "manifest.json"
FORMAT = "gptkernels-shards"
VERSION = 1
TOKEN_DTYPES = ("uint16", "uint32")

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Shard:
    """One shard: the .bin file's name, its tokens, the documents that begin in it, and the sums of
    the .bin file and of the .idx file beside it."""

    name: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str

    @property
    def index(self) -> str:
        """The name of the .idx file."""
        return str(Path(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class Input:
    """One file that was read: its name as it was given, its bytes and their sum."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Fields:
        tokenizer: its name, "gpt1", "gpt2" or "bytes"; every id is less than vocab_size.
        vocab_size: one more than the tokenizer's largest id.
        token_dtype: "uint16" or "uint32".
        eos: the id that every document begins with, or None where the tokenizer has none.
        counts: files, records, scored (records with a score), malformed (records that could not be
            read), kept (records, after all that is dropped), documents (kept records that do not go
            on where another was cut), tokens (each eos included), and characters, utf8_bytes and
            words of what was kept.
        dropped: the reason -> how many records: records = malformed + these + kept.
        shards: in the order in which they are one sequence.
        inputs: in the order in which they were read.
        options: what decides which records are kept, and where shards end.
        versions: of this package and of the libraries that had a part in it.
    """

    tokenizer: str
    vocab_size: int
    token_dtype: str
    eos: int | None
    counts: dict[str, int]
    dropped: dict[str, int]
    shards: tuple[Shard, ...]
    inputs: tuple[Input, ...]
    options: dict[str, Any]
    versions: dict[str, str]


def write(folder: Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json, all of it or nothing."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    with replacing(folder / NAME, durable=True, alone=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest in `folder`.

    Raises FileNotFoundError where there is none, and ValueError, in one sentence, for one that is
    broken or of another version.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, the manifest of prepared shards is wanted")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # of JSON, and of bytes that are not UTF-8
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a manifest of prepared shards (format is not {FORMAT!r})")
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}, this package reads version {VERSION}")
    return _manifest(path, content)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` has a manifest of prepared shards, rather than another manifest.json."""
    path = folder / NAME
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(100)  # it is the first thing that `write` writes


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise FileNotFoundError for a file of `manifest` that is missing, and ValueError for one of
    another size."""
    for shard in manifest.shards:
        _check_size(folder / shard.name, shard.tokens * WIDTHS[manifest.token_dtype])
        _check_size(folder / shard.index, shard.documents * WIDTHS["int64"])


def check(folder: Path, shards: Iterable[Shard], token_dtype: str) -> None:
    """Hold the .bin files of `shards` to their manifest: size and sha256, all bytes of them.

    Raises FileNotFoundError for one that is missing, and ValueError for one that differs.
    """
    for shard in shards:
        _check_file(folder / shard.name, shard.tokens * WIDTHS[token_dtype], shard.sha256)


def check_index(folder: Path, shard: Shard) -> None:
    """Hold a shard's .idx file to its manifest. Raises as `check` does."""
    _check_file(folder / shard.index, shard.documents * WIDTHS["int64"], shard.index_sha256)


def sha256(path: Path) -> str:
    """The sum of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, size: int, wanted: str) -> None:
    _check_size(path, size)
    if sha256(path) != wanted:
        raise ValueError(f"files: {path} has another sha256 than its manifest says")


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"files: {path} does not exist, but its manifest names it")
    if path.stat().st_size != size:
        raise ValueError(
            f"files: {path} has {path.stat().st_size} bytes, but its manifest says {size}"
        )


def _manifest(path: Path, content: dict[str, Any]) -> Manifest:
    for key, kind in (("shards", Shard), ("inputs", Input)):
        parts = content.get(key)
        if not isinstance(parts, list):
            raise ValueError(f"{path} must hold a list as its {key}")
        content[key] = tuple(_of(kind, f"{path}: each of its {key}", part) for part in parts)
    manifest = _of(Manifest, str(path), content)
    if manifest.token_dtype not in TOKEN_DTYPES:
        wanted = " or ".join(TOKEN_DTYPES)
        raise ValueError(f"{path} has the token_dtype {manifest.token_dtype!r}, {wanted} is wanted")
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:  # a path would lead out of the folder
            raise ValueError(f"{path} must hold names of files as its shards, got {shard.name!r}")
    return manifest


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "dict": (dict,),
    "tuple": (tuple,),
}


def _of(kind: type[_Kind], where: str, content: Any) -> _Kind:
    """The dataclass `kind` with these fields, each of the type that its annotation names."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, dict) or content.keys() != fields.keys():
        raise ValueError(f"{where} must hold {', '.join(fields)}")
    for name, wanted in fields.items():
        if not isinstance(content[name], _TYPES[wanted.partition("[")[0]]):
            raise ValueError(f"{where} must hold {wanted} as its {name}, got {content[name]!r}")
    return kind(**content)
