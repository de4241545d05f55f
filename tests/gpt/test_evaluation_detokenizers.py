"""Detokenised texts come back unchanged, and read as a person would write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import DATA
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptkernels.gpt.evaluation import detokenizers
from gptkernels.gpt.evaluation.corpus_styles import Style
from gptkernels.gpt.evaluation.detokenizers import MARK, Detokenised, detokenise, restore

WORDS = """
    = @-@ @,@ @.@ , . ; : ! ? ( ) [ ] " ' `` '' ` -LRB- -RRB- -lrb- 's n't ... -- – / $ %
    <unk> U.S. Mr. No. C 7 000 can not gon na ol' red- 1,000 don't said. \\ \\x
"""

anything = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\\.,'\"@-(=")))
corpus = st.lists(
    st.lists(st.sampled_from([*WORDS.split(), "The", "lobster", ""]), max_size=12).map(" ".join),
    max_size=4,
).flatmap(lambda lines: st.sampled_from(["\n", " \n "]).map(lambda end: end.join(lines)))
each = pytest.mark.parametrize("name", detokenizers.DETOKENIZERS)


@each
@given(text=st.one_of(anything, corpus))
@example(text="")
@example(text=" \n\n \n ")
@example(text=" a\n ")
@settings(max_examples=300)
def test_every_text_comes_back(name: str, text: str) -> None:
    found = detokenise(name, text)
    assert restore(name, found.text) == text
    assert found.text.count("\n") == text.count("\n")
    assert found.kept <= text.count("\n") + 1
    # What is written by a person is a text too: doing it twice can be undone twice.
    again = detokenise(name, found.text)
    assert restore(name, restore(name, again.text)) == text


@given(text=st.text(" ab\n\\", max_size=12))
@settings(max_examples=300)
def test_every_text_comes_back_by_any_rules(text: str) -> None:
    """Rules that lose tokens, change them and cut words do harm to no text."""
    absurd = Style(
        edge=" ",
        quotes=[(re.compile("a( ?)a"), r"b\1")],
        joints=re.compile("(?<=a) "),
        written={"a": "b", "b": "", "ab": "\\"},
        token=re.compile("ab|[^ ]"),
        spelled=lambda match: match[0].replace("b", "a"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(detokenizers.DETOKENIZERS, "absurd", absurd)
        assert restore("absurd", detokenise("absurd", text).text) == text


@pytest.mark.parametrize(
    ("name", "text", "natural"),
    [
        (
            "wikitext",
            " = Homarus = \n \n = = Life cycle = = \n",
            "= Homarus =\n\n== Life cycle ==\n",
        ),
        (
            "wikitext",
            ' The red @-@ tipped " <unk> " ( 24 in ) weighs 1 @,@ 000 @.@ 5 kg , it \'s 5 % . ',
            'The red-tipped "<unk>" (24 in) weighs 1,000.5 kg, it\'s 5%.',
        ),
        (
            "wikitext",
            " In 1914 – 1918 the U.S. paid $ 5 for the lobsters ' and / or H. gammarus . ",
            "In 1914–1918 the U.S. paid $5 for the lobsters' and/or H. gammarus.",
        ),
        (
            "wikitext",
            " <unk> 's 2 @,@ <unk> men sang ' Hey ' ; then : \" Go ! \" ",
            "<unk>'s 2,<unk> men sang 'Hey'; then: \"Go!\"",
        ),
        # A point behind one letter would be an abbreviation's.
        ("wikitext", " Type C . See H. gammarus . ", "Type C . See H. gammarus."),
        (
            "ptb",
            "`` I ca n't , '' said Mr. Fox -LRB- or 'em -RRB- , `` pay $ 5 -- or 1,000 % ... ''",
            '"I can\'t," said Mr. Fox (or \'em), "pay $5 -- or 1,000%..."',
        ),
        (
            "ptb",
            "it 's a ` blundering ' style ( you can not like it ) , is n't it ?",
            "it's a 'blundering' style (you cannot like it), isn't it?",
        ),
        (
            "ptb",
            "the boys ' dog is gon na bark at 10:30 .",
            "the boys' dog is gonna bark at 10:30.",
        ),
    ],
)
def test_a_text_is_written_as_a_person_would(name: str, text: str, natural: str) -> None:
    assert detokenise(name, text) == Detokenised(natural, 0)
    assert restore(name, natural) == text


def test_lines_that_cannot_be_joined_stay() -> None:
    # "1,000th" would be cut: the line stays as it is, and is none that joining gives.
    assert detokenise("wikitext", " His 1,000th , he said . ").kept == 1
    assert detokenise("wikitext", " His 1,000th , he said . ").text == " His 1,000th , he said . "
    # A text that was never cut is what joining another one gives.
    assert detokenise("wikitext", "Hello, he said.") == Detokenised(MARK + "Hello, he said.", 1)
    assert detokenise("ptb", "\\ , he said .\nBut she , no .") == Detokenised(
        MARK + "\\ , he said .\nBut she, no.", 1
    )


def lines_of(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path} does not exist: set GPTKERNELS_DATA to a folder that holds it")
    return path.read_text()


@pytest.mark.parametrize(
    ("name", "file"), [("wikitext", "wikitext-2/valid.txt"), ("ptb", "sst-2/dev.tsv")]
)
def test_few_lines_of_the_corpora_stay(name: str, file: str) -> None:
    text = lines_of(DATA / file)
    if file.endswith(".tsv"):
        text = "\n".join(line.split("\t", 1)[1] for line in text.splitlines()[1:])
    text = text[:300_000]
    found = detokenise(name, text)
    assert restore(name, found.text) == text
    assert found.kept < 0.003 * text.count("\n")
    # Hardly a token still has a space before it that a person would not write.
    assert len(re.findall(r" [,.;)]", found.text)) < 0.01 * len(re.findall(r" [,.;)]", text))


def test_an_unknown_style() -> None:
    for change in (detokenise, restore):
        with pytest.raises(ValueError, match="must be one of wikitext, ptb, got 'lambada'"):
            change("lambada", "A text .")
