"""Reads prepared shards back, document by document, in the order in which they were written."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus.manifest import Manifest
from gptkernels.gpt.corpus.packing import WIDTHS, unpack
from gptkernels.gpt.tokenizer import load_tokenizer


def documents(folder: Path, manifest: Manifest) -> Iterator[array[int]]:
    """The ids of each document, with the eos it begins with. One document is in memory at a time.

    Raises FileNotFoundError or ValueError for a shard that is not as its manifest says.
    """
    kind = manifest.token_dtype
    manifests.check(folder, manifest.shards, kind)
    document = unpack(kind, b"")
    for shard in manifest.shards:
        manifests.check_index(folder, shard)
        place = 0
        with (folder / shard.name).open("rb") as file:
            for start in unpack("int64", (folder / shard.index).read_bytes()):
                document += unpack(kind, file.read((start - place) * WIDTHS[kind]))
                place = start
                if document:
                    yield document
                document = unpack(kind, b"")
            document += unpack(kind, file.read())  # the next shard may go on with it
    if document:
        yield document


def texts(folder: Path) -> Iterator[str]:
    """The text of each document in a prepared `folder`, as its tokenizer gives it back.

    Raises FileNotFoundError or ValueError for a folder that is not as its manifest says, and for
    one without a manifest.
    """
    manifest = manifests.read(folder)
    tokenizer = load_tokenizer(manifest.tokenizer)
    begins = 0 if manifest.eos is None else 1
    for document in documents(folder, manifest):
        yield tokenizer.decode(document[begins:])
