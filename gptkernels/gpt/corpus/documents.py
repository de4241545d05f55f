"""Reads prepared shards back, document by document, in the order in which they were written."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gptkernels.gpt.corpus import manifest as manifests
from gptkernels.gpt.corpus.manifest import Manifest
from gptkernels.gpt.corpus.packing import WIDTHS, unpack
from gptkernels.gpt.tokenizer import Tokenizer, load_tokenizer

_PART = 1 << 18  # tokens


@dataclass(frozen=True, slots=True)
class Part:
    """The text of a document, or, where it `continues`, what follows the part before it."""

    text: str
    continues: bool = False


def texts(folder: Path) -> Iterator[Part]:
    """The documents in a prepared `folder`, as its tokenizer gives them back. A long one comes in
    parts of about 2^18 tokens, cut before white space; where there is none, anywhere.

    Raises FileNotFoundError or ValueError for a folder that is not as its manifest says, and for
    one without a manifest.
    """
    manifest = manifests.read(folder)
    tokenizer = load_tokenizer(manifest.tokenizer)
    document, continues = unpack(manifest.token_dtype, b""), False
    for begins, ids in _runs(folder, manifest):
        if begins:
            if document:
                yield Part(tokenizer.decode(document), continues)
            document, continues = ids[0 if manifest.eos is None else 1 :], False
        else:
            document += ids
        if len(document) >= 2 * _PART:
            end = _place(tokenizer, document)
            yield Part(tokenizer.decode(document[:end]), continues)
            document, continues = document[end:], True
    if document:
        yield Part(tokenizer.decode(document), continues)


def _runs(folder: Path, manifest: Manifest) -> Iterator[tuple[bool, array[int]]]:
    """All ids, at most `_PART` of one document at a time, and whether they begin it."""
    kind = manifest.token_dtype
    manifests.check(folder, manifest.shards, kind)
    for shard in manifest.shards:
        manifests.check_index(folder, shard)
        starts = unpack("int64", (folder / shard.index).read_bytes())
        begins = False  # what comes before the first start goes on from the shard before
        with (folder / shard.name).open("rb") as file:
            for start, end in pairwise([0, *starts, shard.tokens]):
                for place in range(start, end, _PART):
                    size = min(_PART, end - place)
                    yield begins and place == start, unpack(kind, file.read(size * WIDTHS[kind]))
                begins = True


def _place(tokenizer: Tokenizer, ids: array[int]) -> int:
    """The last place in the second half of `ids` where the text that follows begins with white
    space, else the end."""
    for place in range(len(ids) - 1, len(ids) // 2, -1):
        before = tokenizer.decode(ids[place - 1 : place])
        both = tokenizer.decode(ids[place - 1 : place + 1])
        if both.startswith(before) and both[len(before) :][:1].isspace():
            return place
    return len(ids)
