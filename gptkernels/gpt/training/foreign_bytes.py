"""What is no token shard, by its first bytes.

ids alone have no mark of their own, so this looks for the marks of others, and for two patterns
that ids do not have: text, and a 0 in every second place, as ids twice as wide have.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gptkernels.core.files import check_no_pointer

_HEAD = 1 << 16  # bytes
_LEAST = 256  # bytes: fewer may have any pattern by chance
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r"))  # text has none, in any encoding of bytes
# The first number of 256 int32 before the ids, and whose header that is.
_HEADERS = {
    20240520: "llm.c and modded-nanogpt (GPT-2's ids, uint16)",
    20240801: "llm.c (Llama 3's ids, uint32)",
}
_HEADER_BYTES = 1024
_MARKS = {
    b"\x93NUMPY": "an array of numpy: write its ids with tofile",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b\x08\x00": "compressed with gzip",
    b"\x1f\x8b\x08\x08": "compressed with gzip",  # with the file's name
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
}


def check_shard(path: Path, dtype: torch.dtype) -> None:
    """Raise ValueError, in one sentence, where `path` holds other bytes than ids of `dtype`."""
    check_no_pointer(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    whose = _HEADERS.get(int.from_bytes(head[:4], "little"))
    if whose is not None and len(head) >= _HEADER_BYTES:
        raise ValueError(
            f"files: {path} begins with the header of {whose}, but a token shard is ids alone: "
            f"leave out its first {_HEADER_BYTES} bytes"
        )
    for mark, kind in _MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"files: {path} is {kind}, a token shard of ids alone is wanted")
    if len(head) < _LEAST:
        return
    if len(head.translate(None, _CONTROLS)) == len(head):
        raise ValueError(
            f"files: {path} is text, but its name ends as those of token shards do: give it "
            "another, such as .txt"
        )
    whole = len(head) - len(head) % (2 * dtype.itemsize)
    ids = torch.frombuffer(bytearray(head[:whole]), dtype=dtype)
    if ids.any() and not ids[1::2].any():
        raise ValueError(
            f"files: {path} has a 0 in every second place, so its ids are wider than "
            f"{8 * dtype.itemsize} bits (see token_dtype)"
        )
