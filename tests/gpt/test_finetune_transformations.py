"""Input transformations: which tokens, in which order, and what is cut where they are too many."""

from __future__ import annotations

import pytest
from begun import Begun
from finetune_cases import DELIMITER, EXTRACT, START, encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkernels import GPTConfig
from gptkernels.gpt.finetuning.reading import Example
from gptkernels.gpt.finetuning.transformations import Encoder, shortened
from gptkernels.gpt.tokenizer import ByteTokenizer


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_classification_is_a_text_between_start_and_extract() -> None:
    """Section 3.3 of the paper: "randomly initialized start and end tokens"."""
    assert encoder("classification")(Example(("né",))) == [[START, *ids("né"), EXTRACT]]


def test_entailment_has_a_delimiter_between_premise_and_hypothesis() -> None:
    """Section 3.3: "with a delimiter token ($) in between"."""
    sequences = encoder("entailment")(Example(("if", "then")))
    assert sequences == [[START, *ids("if"), DELIMITER, *ids("then"), EXTRACT]]


def test_similarity_has_both_orders() -> None:
    """Section 3.3: "we modify the input sequence to contain both possible sentence orderings"."""
    one, other = ids("one"), ids("other")
    assert encoder("similarity")(Example(("one", "other"))) == [
        [START, *one, DELIMITER, *other, EXTRACT],
        [START, *other, DELIMITER, *one, EXTRACT],
    ]


@given(st.lists(st.text("xyz", max_size=4), min_size=1, max_size=5))
def test_choice_has_a_sequence_for_each_answer(choices: list[str]) -> None:
    """Section 3.3: "adding a delimiter token in between to get [z; q; $; ak]"."""
    example = Example(("story ", "question"), tuple(choices))
    assert encoder("choice")(example) == [
        [START, *ids("story question"), DELIMITER, *ids(choice), EXTRACT] for choice in choices
    ]


def test_the_new_tokens_follow_the_models_vocabulary_not_the_tokenizers() -> None:
    """A model may have more ids than its tokenizer, as GPT-2's 50,304."""
    wide = Encoder("entailment", ByteTokenizer(), 300, 16)
    assert wide(Example(("a", "b"))) == [[300, *ids("a"), 301, *ids("b"), 302]]
    grown = Encoder.of_grown("entailment", ByteTokenizer(), GPTConfig(303, 16, 1, 1, 8))
    assert (grown.start, grown.delimiter, grown.extract) == (300, 301, 302)
    assert grown.length == 16


def test_a_sequence_begins_with_start_and_with_nothing_else() -> None:
    """Whatever the tokenizer puts before a text."""
    begun = Encoder("choice", Begun(), 300, 16)
    assert begun(Example(("a", "b"), ("c",))) == [[300, *ids("ab"), 301, *ids("c"), 302]]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(0, 30))
def test_only_the_longest_parts_lose_tokens(lengths: list[int], room: int) -> None:
    """As much is kept as fits; a part that was cut is as long as the longest, or one shorter; of
    equal ones the first is cut first."""
    if room < len(lengths):
        with pytest.raises(ValueError, match=f"at least {2 * len(lengths) + 1} tokens"):
            shortened(lengths, room)
        return
    kept = shortened(lengths, room)
    assert sum(kept) == min(sum(lengths), room)
    assert all(0 <= after <= before for after, before in zip(kept, lengths, strict=True))
    cut = [i for i, before in enumerate(lengths) if kept[i] < before]
    assert all(kept[i] >= max(kept) - 1 for i in cut)
    assert [kept[i] for i in cut] == sorted(kept[i] for i in cut)


def test_a_part_loses_its_end() -> None:
    short = Encoder("entailment", ByteTokenizer(), 256, 10)
    assert short(Example(("abcdefgh", "xy"))) == [
        [START, *ids("abcde"), DELIMITER, *ids("xy"), EXTRACT]
    ]
    assert short(Example(("xy", "abcdefgh"))) == [
        [START, *ids("xy"), DELIMITER, *ids("abcde"), EXTRACT]
    ]


@given(st.lists(st.text("ab", max_size=9), min_size=2, max_size=4), st.integers(5, 14))
def test_every_sequence_fits_the_context_and_ends_with_extract(
    choices: list[str], length: int
) -> None:
    short = Encoder("choice", ByteTokenizer(), 256, length)
    for row in short(Example(("a story",), tuple(choices))):
        assert len(row) <= length
        assert (row[0], row[-1], row.count(DELIMITER)) == (START, EXTRACT, 1)


def test_an_example_that_was_cut_counts_once() -> None:
    short = Encoder("choice", ByteTokenizer(), 256, 8)
    short(Example(("a",), ("b", "c")))
    assert short.truncated == 0
    short(Example(("a",), ("b", "longer than this", "longer than that")))
    assert short.truncated == 1
    short(Example(("longer than this",), ("b", "c")))
    assert short.truncated == 2
