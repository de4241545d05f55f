"""What flows from a source file to the shards: records, and what stands for a broken one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One page, as its file holds it.

    Fields:
        name: the file and the place in it, as a person finds it: "pages.jsonl.gz:17".
        content: text, or the bytes of an HTML page in whatever encoding it has.
        score: how often others recommended the page, where the source says so.
        continues: whether this text goes on where the record before it was cut.
        charset: of an HTML page, the encoding that the server named, if it named one.
    """

    name: str
    content: str | bytes
    score: float | None = None
    continues: bool = False
    charset: str | None = None


@dataclass(frozen=True, slots=True)
class Malformed:
    """A page that cannot be read: its name, and why, as a clause: "is not JSON"."""

    name: str
    reason: str
