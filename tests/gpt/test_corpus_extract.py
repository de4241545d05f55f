"""The text of a record, and which texts are left out."""

from __future__ import annotations

import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.corpus.extract import extract
from gptkernels.gpt.corpus.filters import refusal
from gptkernels.gpt.corpus.records import Malformed, Record

pytest.importorskip("resiliparse")

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива."
FRENCH = "L'été dernier, à la fenêtre du café, un garçon lisait déjà."
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"


def page(text: str, charset: str = "") -> str:
    head = f'<meta charset="{charset}">' if charset else ""
    return f"<html><head>{head}</head><body><main><p>{text}</p></main></body></html>"


def test_a_text_is_as_it_is() -> None:
    for content in ("", "a\0b\ufeff \r\n", "<p>no page</p>", "\ufffd" * 10):
        assert extract(Record("a", content)) == content


def test_the_main_text_of_a_page_without_what_is_around_it() -> None:
    paragraphs = [f"{i}. {FRENCH}" for i in range(5)]
    html = (
        "<html><head><title>Title</title><style>p {}</style></head><body>"
        "<nav><ul><li><a href='/'>Home</a></li><li><a href='/b'>Subscribe now</a></li></ul></nav>"
        "<article><h1>Le caf\u00e9</h1>" + "".join(f"<p>{p}</p>" for p in paragraphs) + "</article>"
        "<div class='comments'><p>First comment!</p></div><script>var x = 'code'</script>"
        "<footer>Copyright notice</footer></body></html>"
    )
    text = extract(Record("a", html.encode()))
    assert isinstance(text, str)
    assert text.split("\n\n") == ["Le café", *paragraphs]


@pytest.mark.parametrize(
    ("text", "encoding", "named", "served"),
    [
        (FRENCH, "utf-8", "", None),
        (FRENCH, "utf-8-sig", "", None),
        (FRENCH, "utf-8", "iso-8859-1", "windows-1252"),  # both are wrong, and the bytes tell
        (FRENCH, "iso-8859-1", "iso-8859-1", None),
        (FRENCH, "iso-8859-1", "", "ISO-8859-1"),
        (RUSSIAN, "koi8-r", "", "koi8-r"),
        (RUSSIAN, "koi8-r", "windows-1251", "koi8-r"),  # the server's word counts for more
        (RUSSIAN, "koi8-r", "windows-1251", '"KOI8-R"'),
        (RUSSIAN, "koi8-r", "utf-8", None),  # the page is wrong, and the bytes tell
        ("Ёж", "koi8-r", "koi8-r", None),  # too few bytes to tell
        (RUSSIAN, "windows-1251", "windows-1251", "klingon"),
        (RUSSIAN, "windows-1251", "windows-1251", "utf-8"),
        (JAPANESE, "shift_jis", "Shift_JIS", None),
        (JAPANESE, "euc-jp", "", "euc-jp"),
        (JAPANESE, "utf-16", "", None),
    ],
)
def test_pages_in_many_encodings(text: str, encoding: str, named: str, served: str | None) -> None:
    assert extract(Record("a", page(text, named).encode(encoding), charset=served)) == text


@pytest.mark.parametrize("name", ["utf-16", "utf-16le", "UTF-16BE", "unicode"])
def test_utf16_is_not_believed_of_bytes_that_cannot_be_it(name: str) -> None:
    text = "It is a truth universally acknowledged."
    for extra in ("", " "):  # one of them has an even length
        assert extract(Record("a", page(text + extra, name).encode())) == text
        assert extract(Record("a", page(text + extra).encode(), charset=name)) == text
        assert extract(Record("a", page(FRENCH + extra, name).encode("latin-1"))) == FRENCH
    served = Record("a", page(RUSSIAN).encode("utf-16-le"), charset="utf-16le")
    assert extract(served) == RUSSIAN


def test_a_few_wrong_bytes_are_no_reason_to_drop_a_page() -> None:
    content = page((FRENCH * 5).replace("garçon", "gar@on", 1), "utf-8").encode()
    text = extract(Record("a", content.replace(b"@", b"\xff"), charset="utf-8"))
    assert text == (FRENCH * 5).replace("garçon", "gar\ufffdon", 1)


@pytest.mark.parametrize("content", [bytes(range(256)) * 20, b"\0" * 100, b"<p>\0\1\2\xff" * 50])
def test_bytes_in_no_encoding_are_malformed(content: bytes) -> None:
    assert extract(Record("a:1", content)) == Malformed("a:1", "is in no encoding that can be told")


@given(st.binary(max_size=200), st.none() | st.text(max_size=12))
def test_no_page_raises(content: bytes, charset: str | None) -> None:
    found = extract(Record("a", content, charset=charset))
    if isinstance(found, str):
        found.encode()  # no half of a surrogate pair
    assert extract(Record("a", content, charset=charset)) == found


def test_a_page_that_is_nested_too_deep_is_malformed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # <html> and <body> are elements too.
    assert extract(Record("a", b"<div>" * 510 + b"deep")) == "deep"
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)  # it would take an hour
    found = extract(Record("a", b"<div>" * 100_000 + b"deep"))
    assert found == Malformed("a", "has more than 512 elements in each other")


def test_it_works_in_another_process() -> None:
    assert pickle.loads(pickle.dumps(extract)) is extract
    record = Record("a", b"<p>x", 2.0, charset="utf-8")
    assert pickle.loads(pickle.dumps(record)) == record


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resiliparse.parse.html", None)
    with pytest.raises(ImportError, match=r"pip install 'gptkernels\[data\]'"):
        extract(Record("a", b"<p>x"))
    assert extract(Record("a", "x")) == "x"


@pytest.mark.parametrize(
    ("text", "score", "options", "reason"),
    [
        ("a", None, {}, None),
        ("a", 3.0, {}, None),  # WebText: "at least 3 karma"
        ("a", 2.999, {}, "low score"),
        ("a", 2.0, {"min_score": 2.0}, None),
        ("a", -5.0, {"min_score": -4.0}, "low score"),
        ("", None, {}, "too short"),
        (" \n\t\u00a0", 9.0, {}, "too short"),
        ("", None, {"min_characters": 0}, None),
        (" abc ", None, {"min_characters": 3}, None),
        (" abc ", None, {"min_characters": 4}, "too short"),
        ("", 1.0, {}, "low score"),
    ],
)
def test_the_filters(
    text: str, score: float | None, options: dict[str, float], reason: str | None
) -> None:
    assert refusal(text, score, **options) == reason  # type: ignore[arg-type]
