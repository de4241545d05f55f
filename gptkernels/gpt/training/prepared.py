"""Folders that `gptkernels prepare` wrote, as the files of a run.

A folder stands for the shards that its manifest names; a shard with a manifest beside it is held to
it. The manifest says which tokenizer and which dtype the ids have, so that nobody has to, and sizes
and sums, so that a run does not train on a shard that is not what was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus import state
from gptkernels.gpt.corpus.manifest import Manifest, Shard
from gptkernels.gpt.tokenizer import Tokenizer, holds, load_tokenizer, name_of
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.vocabulary import OWN


def settled(
    files: Sequence[str | Path], config: TrainConfig, tokenizer: str = "bytes"
) -> TrainConfig:
    """`config` with the tokenizer and token_dtype of the manifests in place of "auto"; where there
    is none, `tokenizer` and "uint16". A tokenizer of the model's own stays (`checked` compares it).

    Raises ValueError where a manifest contradicts it, or is broken or of another version, and for a
    shard that the manifest beside it does not name.
    """
    otherwise = {"tokenizer": tokenizer, "token_dtype": "uint16"}
    settings: dict[str, Any] = {name: getattr(config, name) for name in otherwise}
    for part in _parts(files):
        if isinstance(part, Path):
            continue
        for name, asked in settings.items():
            said = getattr(part.manifest, name)
            if asked not in ("auto", OWN, said):
                raise ValueError(f"{name} is {asked!r}, but {part.path} says {said!r}")
            settings[name] = OWN if asked == OWN else said
    for name, value in otherwise.items():
        if settings[name] == "auto":
            settings[name] = value
    return dataclasses.replace(config, **settings)


def checked(files: Sequence[str | Path], tokenizer: Tokenizer) -> list[Path]:
    """`files`, with the shards of each folder in its place. Every byte of them is read: 1 or 2 GB
    take a second.

    tokenizer: the run's. Raises as `settled` does, and FileNotFoundError or ValueError for a shard
    that is missing, has another size or another sha256 than its manifest says, for a manifest of
    another vocab_size, and for ids that mean something else to the tokenizer.
    """
    paths = []
    for part in _parts(files):
        if isinstance(part, Path):
            paths.append(part)
            continue
        name, count = part.manifest.tokenizer, part.manifest.vocab_size
        made_by = tokenizer if name_of(tokenizer) == name else load_tokenizer(name)
        if count != made_by.vocab_size:
            raise ValueError(
                f"files: {part.path} says vocab_size={count}, but the tokenizer {name!r} has "
                f"{made_by.vocab_size} tokens"
            )
        if not holds(tokenizer, made_by):
            raise ValueError(
                f"files: {part.path} says the tokenizer {name!r}, whose ids are not those of the "
                "model's own tokenizer"
            )
        manifests.check(part.path.parent, part.shards, part.manifest.token_dtype)
        paths += [part.path.parent / shard.name for shard in part.shards]
    return paths


@dataclass(frozen=True)
class _Prepared:
    path: Path  # of the manifest
    manifest: Manifest
    shards: tuple[Shard, ...]


def _parts(files: Sequence[str | Path]) -> Iterator[_Prepared | Path]:
    """Each file: what its manifest says of it, or itself where it has none."""
    for file in map(Path, files):
        folder = file if file.is_dir() else file.parent
        path = folder / manifests.NAME
        if file == folder and (folder / state.NAME).exists() and not path.exists():
            raise ValueError(f"files: {folder} is not finished, go on with gptkernels prepare")
        if not path.exists() or (file != folder and file.suffix != ".bin"):
            yield file
            continue
        manifest = manifests.read(folder)
        shards = [shard for shard in manifest.shards if file in (folder, folder / shard.name)]
        if not shards:
            raise ValueError(f"files: {file} is not among the shards that {path} names")
        yield _Prepared(path, manifest, tuple(shards))
