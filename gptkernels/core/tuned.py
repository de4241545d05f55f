"""Who won where it was measured: classes of calls, and the table of their winners.

A call belongs to a class by what it computes (op, direction, dtypes, widths, options) and by its
sizes in octaves: bucket k holds the sizes 2^(k-1) < n <= 2^k. A class was measured at both ends of
its buckets, at "positions" 0 and 1 between them. A way that won at both wins the class. Where the
two differ, the class was halved, and each part has the winner of its own ends.

A way is what can compute a call:

    pytorch               PyTorch's own function with its own autograd; no implementation of ours
    external:NAME         another package's, likewise
    torch, cpu, triton, cuda   an implementation of ours; after a colon its variant, such as
                          cpu:v3 (an instruction set), torch:backend=1 (one of SDPA's)
    FORWARD+BACKWARD      two implementations of ours, for a call that is differentiated
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PYTORCH, EXTERNAL = "pytorch", "external:"
FORWARD, TRAINING = "forward", "training"
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Key:
    """A class of calls.

    direction: "forward" where nothing needs a gradient, else "training".
    mode: "eager" or "compiled".
    facts: what is the same for the whole class, by name and sorted; numbers, strings and bools.
    buckets: axis -> its octave, sorted.
    """

    op: str
    direction: str
    mode: str
    facts: tuple[tuple[str, Any], ...]
    buckets: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls, op: str, direction: str, mode: str, facts: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> Key:
        """The class of a call with these sizes."""
        octaves = {axis: bucket(size) for axis, size in sizes.items()}
        return cls(op, direction, mode, _sorted(facts), _sorted(octaves))

    def as_dict(self) -> dict[str, Any]:
        """As a line of a file has it."""
        return {
            "op": self.op,
            "direction": self.direction,
            "mode": self.mode,
            "facts": dict(self.facts),
            "buckets": dict(self.buckets),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Key:
        """The inverse of as_dict. Raises KeyError, TypeError and ValueError for anything else."""
        op, direction, mode = (_word(given[name]) for name in ("op", "direction", "mode"))
        octaves = {_word(axis): k for axis, k in dict(given["buckets"]).items()}
        if not all(type(k) is int and 0 <= k <= _MOST_OCTAVES for k in octaves.values()):
            raise ValueError(f"a bucket must be an integer between 0 and {_MOST_OCTAVES}")
        facts = {_word(name): value for name, value in dict(given["facts"]).items()}
        if not all(_is_fact(value) for value in facts.values()):
            raise ValueError("a fact must be a word, a finite number or a bool")
        return cls(op, direction, mode, _sorted(facts), _sorted(octaves))

    def __str__(self) -> str:
        sizes = " ".join(_range(axis, k) for axis, k in self.buckets)
        facts = " ".join(_said(name, value) for name, value in self.facts if _tells(name, value))
        return f"{self.op} {self.direction} {self.mode}: {facts}; {sizes}"


@dataclass(frozen=True)
class Entry:
    """What was found for a class.

    ranges: (end, way), in order: the way that wins up to this position; the last end is 1.
    points: what was measured, for people: position, sizes, and of each way its seconds.
    refused: way -> why it may not be chosen.
    errors: way -> its error against fp64, and the error's limit.
    origin: where it was measured: "here", or the machine of a table that ships with the package.
    """

    key: Key
    ranges: tuple[tuple[float, str], ...]
    points: tuple[dict[str, Any], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    origin: str = "here"

    def way(self, position: float) -> str:
        """The way that wins there."""
        return next(way for end, way in self.ranges if position <= end)

    def as_dict(self) -> dict[str, Any]:
        """As a line of a file has it."""
        return {
            "key": self.key.as_dict(),
            "ranges": [list(pair) for pair in self.ranges],
            "points": list(self.points),
            "refused": self.refused,
            "errors": {way: list(pair) for way, pair in self.errors.items()},
            "origin": self.origin,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Entry:
        """The inverse of as_dict. Raises KeyError, TypeError and ValueError for anything else."""
        ranges = tuple((_number(end), _word(way)) for end, way in given["ranges"])
        ends = [end for end, _ in ranges]
        if not all(0 <= end <= 1 for end in ends) or ends != sorted(ends) or ends[-1:] != [1.0]:
            raise ValueError("the ranges of an entry must rise, and end at 1")
        errors = dict(given["errors"]).items()
        return cls(
            Key.from_dict(given["key"]),
            ranges,
            tuple(dict(point) for point in given["points"]),
            {_word(way): _word(why) for way, why in dict(given["refused"]).items()},
            {_word(way): (_number(error), _number(limit)) for way, (error, limit) in errors},
            _word(given["origin"]),
        )


class Table:
    """Entries by class."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = {entry.key: entry for entry in entries}

    def get(self, key: Key) -> Entry | None:
        """What was found for a class; None where it was not measured."""
        return self.entries.get(key)

    def unanimous(self, op: str, direction: str, mode: str, facts: Mapping[str, Any]) -> str | None:
        """The one way that wins in all measured buckets of the classes with these facts, and
        perhaps others; None where nothing was measured, or winners differ."""
        wanted = facts.items()
        ways = {
            way
            for key, entry in self.entries.items()
            if (key.op, key.direction, key.mode) == (op, direction, mode)
            and wanted <= dict(key.facts).items()
            for _, way in entry.ranges
        }
        return ways.pop() if len(ways) == 1 else None

    def digest(self) -> str:
        """A hash of all choices: two tables with the same one choose alike."""
        lines = sorted(
            json.dumps([entry.key.as_dict(), *map(_plain, entry.ranges)], sort_keys=True)
            for entry in self.entries.values()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _plain(pair: tuple[float, str]) -> list[Any]:
    """A range as a file has it: 1 and 1.0 are one end."""
    end, way = pair
    return [float(end), str(way)]


def bucket(size: int) -> int:
    """The octave k of a size: 2^(k-1) < size <= 2^k."""
    return (size - 1).bit_length() if size > 1 else 0


def ends(k: int) -> tuple[int, int]:
    """The least and the largest size of an octave."""
    return (2 ** (k - 1) + 1 if k else 1), 2**k


def position(sizes: Iterable[int]) -> float:
    """Where a call lies between the ends of its class: the mean over its axes of
    log(size / least) / log(largest / least); 1 where no axis has two ends."""
    places = []
    for size in sizes:
        least, largest = ends(bucket(size))
        if least < largest:
            places.append(math.log(size / least) / math.log(largest / least))
    return sum(places) / len(places) if places else 1.0


# The largest size of any tensor is below 2^62.
_MOST_OCTAVES = 62


def _word(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"a word is wanted, got {type(given).__name__}")
    return given


def _number(given: Any) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool):
        raise TypeError(f"a number is wanted, got {type(given).__name__}")
    try:
        return float(given)
    except OverflowError:  # an integer of hundreds of digits
        raise ValueError("a number is too large") from None


def _is_fact(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int)  # a bool is an int


def _sorted(named: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(named.items()))


def _range(axis: str, k: int) -> str:
    least, largest = ends(k)
    return f"{axis} {least}" if least == largest else f"{axis} {least}...{largest}"


# Facts of every class of a machine; what is False, absent or usual says nothing.
_PLAIN = {"device", "threads"}
_USUAL = ("none", "contiguous", -1)


def _tells(name: str, value: Any) -> bool:
    return value is not False and value not in _USUAL and name not in _PLAIN


def _said(name: str, value: Any) -> str:
    if value is True:
        return name
    return str(value) if name == "dtype" else f"{name} {value}"
