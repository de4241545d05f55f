"""Integers as the bytes of a file: little-endian, whatever the machine."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

_CODES = {"uint16": "H", "uint32": "I", "int64": "q"}
WIDTHS = {kind: array(code).itemsize for kind, code in _CODES.items()}
"""Bytes of one integer of each kind."""


def pack(kind: str, integers: Iterable[int]) -> bytes:
    """Their bytes, `kind` being "uint16", "uint32" or "int64"."""
    return _turned(array(_CODES[kind], integers)).tobytes()


def unpack(kind: str, content: bytes) -> array[int]:
    """The integers that `pack` made `content` of."""
    return _turned(array(_CODES[kind], content))


def _turned(integers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        integers.byteswap()
    return integers
