"""Exact and near duplicates: fingerprints against their definitions, decisions against a plain
search through all earlier texts."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import struct
import sys
from typing import Any
from unittest import mock

import pytest
from harness import command
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels.gpt.corpus.duplicates import Duplicates
from gptkernels.gpt.corpus.fingerprints import fingerprint, rows_of_bands

rensa = pytest.importorskip("rensa")

WORDS = [f"word{i}" for i in range(2000)]


def text(seed: int, length: int = 300) -> list[str]:
    return random.Random(seed).sample(WORDS, length)


def changed(words: list[str], places: range) -> list[str]:
    return [f"other{i}" if i in places else word for i, word in enumerate(words)]


def resemblance(a: list[str], b: list[str]) -> float:
    """|A and B| / |A or B| of the shingles, as Broder defines it."""
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(one & other) / len(one | other)


def kinds(texts: list[str], threshold: float = 0.8) -> list[str | None]:
    seen = Duplicates(sqlite3.connect(":memory:"), threshold)
    return [seen.kind(fingerprint(one, rows_of_bands(threshold))) for one in texts]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("Caf\u00e9  au\nlait ", True),
        ("Cafe\u0301 au lait", True),  # NFC
        ("\u2003Caf\u00e9 au lait", True),
        ("caf\u00e9 au lait", False),
        ("Caf\u00e9 aulait", False),
        ("Caf\u00e9 au lait.", False),
    ],
)
def test_exact_duplicates_are_equal_up_to_white_space_and_normal_form(
    other: str, same: bool
) -> None:
    found = kinds(["Caf\u00e9 au lait", other])
    assert found == [None, "exact duplicate" if same else None]


def test_a_near_duplicate_is_dropped_and_what_resembles_it_less_is_kept() -> None:
    first = text(0)
    near, far = changed(first, range(0, 300, 60)), changed(first, range(0, 300, 25))
    assert resemblance(first, near) > 0.85
    assert 0.5 < resemblance(first, far) < 0.7
    found = kinds([" ".join(words) for words in (first, near, far, near)])
    assert found == [None, "near duplicate", None, "exact duplicate"]


def test_the_threshold_decides() -> None:
    first, other = text(0), changed(text(0), range(0, 300, 25))
    texts = [" ".join(first), " ".join(other)]
    assert kinds(texts, 0.5) == [None, "near duplicate"]
    assert kinds(texts, 0.9) == [None, None]
    assert kinds([texts[0], texts[0] + "!"], 1.0) == [None, "near duplicate"]


def test_case_and_punctuation_make_no_text_new() -> None:
    words = text(1)
    again = ", ".join(word.upper() for word in words) + "."
    assert kinds([" ".join(words), again]) == [None, "near duplicate"]


def test_short_texts_have_no_near_duplicates() -> None:
    assert kinds(["a b c d", "A b c d", "a b c d e", "A b c d e"]) == [
        None,
        None,
        None,
        "near duplicate",
    ]
    assert not fingerprint("a b c d", 6).bands


def test_nothing_but_the_digest_where_no_near_duplicates_are_wanted() -> None:
    wanted = fingerprint(" ".join(text(0)), 6)
    alone = fingerprint(" ".join(text(0)), 0)
    assert alone.digest == wanted.digest
    assert wanted.bands
    assert (alone.signature, alone.bands) == (b"", ())


def test_words_that_no_space_divides_are_told_apart() -> None:
    characters = [chr(0x4E00 + i) for i in random.Random(0).sample(range(3000), 400)]
    again = characters.copy()
    again[200] = chr(0x4E00 + 4000)
    assert kinds(["".join(characters), "".join(again)]) == [None, "near duplicate"]


@pytest.mark.parametrize("step", [10, 20, 40, 80])
def test_the_estimate_is_that_of_broders_resemblance(step: int) -> None:
    """The share of equal numbers has the deviation of 128 draws."""
    errors = []
    for seed in range(40):
        a, b = text(seed), changed(text(seed), range(0, 300, step))
        one, other = (struct.unpack("<128I", fingerprint(" ".join(t), 6).signature) for t in (a, b))
        errors.append(sum(map(int.__eq__, one, other)) / 128 - resemblance(a, b))
    true = resemblance(a, b)
    deviation = (true * (1 - true) / 128) ** 0.5
    assert abs(sum(errors) / 40) < 5 * deviation / 40**0.5
    assert max(map(abs, errors)) < 5 * deviation


@given(st.floats(0.1, 1.0))
def test_bands_leave_pairs_at_the_threshold_a_chance_of_99_percent(threshold: float) -> None:
    def found(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (128 // rows)

    rows = rows_of_bands(threshold)
    assert found(rows) >= 0.99
    assert rows == 128 or all(found(more) < 0.99 for more in range(rows + 1, 129))


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = """
from gptkernels.gpt.corpus.fingerprints import fingerprint
f = fingerprint("It is a truth universally acknowledged, that a single man", 6)
print(f.digest.hex(), f.signature.hex(), f.bands)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seeds = ({**environment, "PYTHONHASHSEED": seed} for seed in ("1", "2"))
    one, other = (command(sys.executable, "-c", code, env=env, check=True).stdout for env in seeds)
    assert one == other
    words = b" It is a truth universally acknowledged, that a single man"
    assert one.startswith(hashlib.blake2b(words, digest_size=16).hexdigest())


@given(st.text(alphabet="ab, \n\u00e9", max_size=80), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_a_fingerprint_in_pieces_is_that_of_the_whole(text: str, piece: int) -> None:
    whole = fingerprint(text, 6)
    with (
        mock.patch("gptkernels.gpt.corpus.pieces.PIECE", piece),
        mock.patch("gptkernels.gpt.corpus.pieces._LONGEST", 100),
    ):
        assert fingerprint(text, 6) == whole


class Plainly:
    """The decisions by their definition, with lists instead of tables and bands that are not
    hashed."""

    def __init__(self, threshold: float) -> None:
        self.rows, self.threshold = rows_of_bands(threshold), threshold
        self.texts: set[str] = set()
        self.bands: dict[tuple[int, Any], list[int]] = {}

    def kind(self, one: str) -> str | None:
        if one in self.texts:
            return "exact duplicate"
        self.texts.add(one)
        words = one.split()
        if len(words) < 5:
            return None
        minhash = rensa.RMinHash(128, 1)
        minhash.update([" ".join(words[i : i + 5]) for i in range(len(words) - 4)])
        own = minhash.digest()
        bands = [
            (place, tuple(own[place * self.rows : (place + 1) * self.rows]))
            for place in range(128 // self.rows)
        ]
        for band in bands:
            other = self.bands.get(band)
            if other and sum(map(int.__eq__, own, other)) / 128 >= self.threshold:
                return "near duplicate"
        for band in bands:
            self.bands.setdefault(band, own)
        return None


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=14).map(" ".join),
        max_size=25,
    ),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 0.95]),
)
@settings(max_examples=60, deadline=None)
def test_decisions_are_those_of_a_plain_search(texts: list[str], threshold: float) -> None:
    plainly = Plainly(threshold)
    assert kinds(texts, threshold) == [plainly.kind(one) for one in texts]
