"""core.tuned: the classes of calls, the positions in them, and the table of their winners."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptkernels.core import tuned
from gptkernels.core.tuned import COMPILED, EAGER, FORWARD, TRAINING, Entry, Key, Table

FACTS = {"device": "cpu", "threads": 2, "dtype": "bfloat16", "D": 64, "causal": True, "left": -1}


def key(op: str = "attention", direction: str = FORWARD, mode: str = EAGER, **sizes: int) -> Key:
    return Key.of(op, direction, mode, FACTS, sizes or {"Tq": 100, "Tk": 1024})


def entry(*ranges: tuple[float, str], of: Key | None = None, **more: Any) -> Entry:
    return Entry(of or key(), ranges or ((1.0, "cpu"),), **more)


FULL = entry(
    (0.25, "pytorch"), (0.5, "cpu+torch"), (1.0, "cpu:v3"),
    points=({"position": 0.0, "sizes": {"Tq": 65}, "seconds": {"cpu": 1e-5, "torch": 2e-5}},),
    refused={"cuda": "it is not measured here"},
    errors={"cpu": (1e-7, 2e-7), "torch": (math.inf, 1e-6)},
    origin="a CPU, 2 threads",
)  # fmt: skip


def test_octaves() -> None:
    """Bucket k holds the sizes 2^(k-1) < n <= 2^k."""
    assert [tuned.bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert [tuned.ends(k) for k in range(5)] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]


@given(st.integers(1, 2**62))
@example(2**53 + 1)  # which no float holds
def test_a_size_lies_between_the_ends_of_its_bucket(size: int) -> None:
    k = tuned.bucket(size)
    least, largest = tuned.ends(k)
    assert least <= size <= largest
    assert tuned.bucket(least) == tuned.bucket(largest) == k
    assert tuned.bucket(largest + 1) == k + 1


@settings(max_examples=50)
@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=4))
def test_position(sizes: list[int]) -> None:
    """It is 0 where each axis is at its lower end and 1 where each is at its upper one. Axes of one
    size do not count."""
    octaves = [tuned.ends(tuned.bucket(size)) for size in sizes]
    lower, upper = ([pair[side] for pair in octaves] for side in (0, 1))
    wide = [pair for pair in octaves if pair[0] < pair[1]]
    assert tuned.position(lower) == (0.0 if wide else 1.0)
    assert tuned.position(upper) == 1.0
    here = tuned.position(sizes)
    assert 0.0 <= here <= 1.0
    assert tuned.position([*sizes, 1, 2]) == pytest.approx(here)
    assert tuned.position(reversed(sizes)) == pytest.approx(here)


def test_position_is_the_mean_of_logarithms() -> None:
    assert tuned.position([4, 3]) == 0.5
    assert tuned.position([8]) == 1.0
    middle = math.log(6 / 5) / math.log(8 / 5)
    assert tuned.position([6]) == pytest.approx(middle)
    assert tuned.position([6, 1, 4]) == pytest.approx((middle + 1) / 2)
    assert tuned.position([]) == 1.0


@pytest.mark.parametrize(
    ("position", "way"),
    [
        (0.0, "pytorch"),
        (0.25, "pytorch"),
        (math.nextafter(0.25, 1), "cpu+torch"),
        (0.5, "cpu+torch"),
        (math.nextafter(0.5, 1), "cpu:v3"),
        (1.0, "cpu:v3"),
    ],
)
def test_the_way_at_and_between_ends(position: float, way: str) -> None:
    assert FULL.way(position) == way


def test_a_class_depends_on_octaves_and_on_no_order() -> None:
    assert key(Tq=65, Tk=1024) == key(Tk=513, Tq=128)
    assert key(Tq=65, Tk=1024) != key(Tq=64, Tk=1024)
    turned = dict(reversed(FACTS.items()))
    assert Key.of("attention", FORWARD, EAGER, turned, {"Tk": 1024, "Tq": 100}) == key()
    for name in FACTS:
        other = Key.of("attention", FORWARD, EAGER, {**FACTS, name: "other"}, {"Tq": 9, "Tk": 9})
        assert other != key(Tq=9, Tk=9)
    assert len({key(), key("layer_norm"), key(direction=TRAINING), key(mode=COMPILED)}) == 4


def through_json(given: Any) -> Any:
    return json.loads(json.dumps(given.as_dict()))


@settings(max_examples=50)
@given(
    facts=st.dictionaries(
        st.text(),
        st.text()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False),
    ),
    sizes=st.dictionaries(st.text(), st.integers(1, 2**62)),
    texts=st.tuples(st.text(), st.text(), st.text()),
)
def test_a_key_comes_back_from_json(
    facts: dict[str, Any], sizes: dict[str, int], texts: tuple[str, str, str]
) -> None:
    given = Key.of(*texts, facts, sizes)
    found = Key.from_dict(through_json(given))
    assert found == given
    assert hash(found) == hash(given)
    assert [type(value) for _, value in found.facts] == [type(value) for _, value in given.facts]


@settings(max_examples=50)
@given(
    ends=st.sets(st.floats(0, 1, exclude_max=True), max_size=3),
    ways=st.lists(st.text(), min_size=4, max_size=4),
    errors=st.dictionaries(st.text(), st.tuples(st.floats(allow_nan=False), st.floats(0, 1))),
)
def test_an_entry_comes_back_from_json(
    ends: set[float], ways: list[str], errors: dict[str, tuple[float, float]]
) -> None:
    ranges = tuple(zip([*sorted(ends), 1.0], ways, strict=False))
    given = dataclasses.replace(FULL, ranges=ranges, errors=errors)
    assert Entry.from_dict(through_json(given)) == given


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300)
@given(path=st.lists(st.integers(0, 9), max_size=4), value=JSON)
@example(path=[], value=10**400)
@example(path=[3], value=[])  # where .items is asked for
def test_garbage_is_refused_with_the_errors_that_are_promised(path: list[int], value: Any) -> None:
    """One part of a good line, whichever, is replaced by any JSON value."""
    line = {"line": through_json(FULL)}
    there: Any = line
    name: Any = "line"
    for step in path:
        inner = there[name]
        if not isinstance(inner, dict | list) or not inner:
            break
        there, names = inner, [*inner] if isinstance(inner, dict) else range(len(inner))
        name = names[step % len(names)]
    there[name] = value
    try:
        found = Entry.from_dict(line["line"])
    except (KeyError, TypeError, ValueError):
        return
    # What is taken is of use: it is found, it has a way everywhere, and it is written and read.
    assert Table([found]).get(found.key) is found
    for position in (0.0, 0.3, 1.0):
        assert isinstance(found.way(position), str)
    assert len(str(found.key)) < 10_000
    assert Entry.from_dict(through_json(found)).ranges == found.ranges


WRONG: dict[str, tuple[list[Any], Any]] = {
    "a bucket that no tensor has": (["key", "buckets", "Tq"], 10**9),
    "a negative bucket": (["key", "buckets", "Tq"], -1),
    "an infinite bucket": (["key", "buckets", "Tq"], math.inf),
    "a bucket that is a word": (["key", "buckets", "Tq"], "7"),
    "a fact that is a list": (["key", "facts", "D"], [64]),
    "a fact that equals nothing": (["key", "facts", "D"], math.nan),
    "a fact that is nothing": (["key", "facts", "D"], None),
    "an op that is a number": (["key", "op"], 3),
    "no ranges": (["ranges"], []),
    "ranges that end early": (["ranges"], [[0.5, "cpu"]]),
    "ranges that fall": (["ranges"], [[0.5, "cpu"], [0.25, "torch"], [1.0, "cpu"]]),
    "a range that ends nowhere": (["ranges"], [[math.nan, "cpu"], [1.0, "torch"]]),
    "a range beyond the end": (["ranges"], [[2.0, "cpu"], [1.0, "torch"]]),
    "an end of 400 digits": (["ranges"], [[10**400, "cpu"], [1.0, "torch"]]),
    "a way that is a number": (["ranges"], [[1.0, 7]]),
    "errors in a list": (["errors"], [1]),
    "an error without a limit": (["errors"], {"cpu": [1.0]}),
    "a reason that is a number": (["refused"], {"cpu": 1}),
    "points in no list": (["points"], 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_refused(name: str) -> None:
    path, value = WRONG[name]
    line = through_json(FULL)
    assert Entry.from_dict(line) == FULL
    there = line
    for step in path[:-1]:
        there = there[step]
    there[path[-1]] = value
    with pytest.raises((KeyError, TypeError, ValueError)):
        Entry.from_dict(line)


@pytest.mark.parametrize("name", ["key", "ranges", "points", "refused", "errors", "origin"])
def test_a_line_without_a_part_is_refused(name: str) -> None:
    line = through_json(FULL)
    del line[name]
    with pytest.raises(KeyError):
        Entry.from_dict(line)


def test_a_table_has_the_last_entry_of_a_class() -> None:
    table = Table([entry((1.0, "torch")), entry((1.0, "cpu"))])
    found = table.get(key())
    assert found is not None
    assert found.way(1.0) == "cpu"
    assert table.get(key(Tq=1, Tk=1)) is None


def test_unanimous() -> None:
    def of(
        *ranges: tuple[float, str], mode: str = COMPILED, dtype: str = "float32", T: int = 64
    ) -> Entry:
        facts = {**FACTS, "dtype": dtype}
        return entry(*ranges, of=Key.of("attention", FORWARD, mode, facts, {"Tq": T, "Tk": T}))

    def way(*entries: Entry) -> str | None:
        wanted = {"dtype": "float32", "device": "cpu"}
        return Table(entries).unanimous("attention", FORWARD, COMPILED, wanted)

    one = of((1.0, "cpu"))
    assert way() is None
    assert way(one) == "cpu"
    assert way(one, of((1.0, "cpu"), T=512)) == "cpu"
    assert way(one, of((1.0, "torch"), T=512)) is None
    assert way(of((0.5, "cpu"), (1.0, "torch"))) is None
    assert way(of((0.5, "cpu"), (1.0, "cpu"))) == "cpu"
    # Classes of other facts, modes, directions and ops have no say.
    others = [of((1.0, "torch"), dtype="bfloat16"), of((1.0, "torch"), mode=EAGER)]
    for change in ({"direction": TRAINING}, {"op": "layer_norm"}):
        others.append(entry((1.0, "torch"), of=dataclasses.replace(one.key, **change)))
    assert way(one, *others) == "cpu"
    assert way(*others) is None


def test_a_digest_is_of_the_choices_alone() -> None:
    a, b = entry((0.5, "cpu"), (1.0, "torch")), entry((1.0, "cpu"), of=key(Tq=1, Tk=1))
    digest = Table([a, b]).digest()
    assert Table([b, a]).digest() == digest
    again = [Entry.from_dict(through_json(given)) for given in (b, a)]
    assert Table(again).digest() == digest
    timed = dataclasses.replace(a, points=({"seconds": {"cpu": 1.0}},), errors={"cpu": (0.0, 1.0)})
    assert Table([timed, b]).digest() == digest
    others = [
        [a],
        [a, entry((1.0, "torch"), of=b.key)],
        [entry((0.25, "cpu"), (1.0, "torch")), b],
        [a, entry((1.0, "cpu"), of=key(Tq=2, Tk=1))],
        [a, entry((1.0, "cpu"), of=dataclasses.replace(b.key, mode=COMPILED))],
        [],
    ]
    assert len({digest, *(Table(entries).digest() for entries in others)}) == len(others) + 1


def test_a_class_reads_as_one_line() -> None:
    assert str(key()) == "attention forward eager: D 64 causal bfloat16; Tk 513...1024 Tq 65...128"
    facts = {"dtype": "float32", "mask": "none", "lse": False, "layout": "strided", "right": 0}
    said = str(Key.of("attention", TRAINING, EAGER, facts, {"Tq": 1, "Tk": 2}))
    assert said == "attention training eager: float32 layout strided right 0; Tk 2 Tq 1"
    contiguous = str(Key.of("attention", TRAINING, EAGER, {"layout": "contiguous"}, {"Tq": 1}))
    assert contiguous == "attention training eager: ; Tq 1"
