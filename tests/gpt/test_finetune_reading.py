"""The files of a task: what each format holds, and that no broken line goes unnoticed."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import TRANSFORMATIONS, examples, task, write_data
from hypothesis import given
from hypothesis import strategies as st

from gptkernels.gpt.finetuning.reading import Example, read_split
from gptkernels.gpt.finetuning.task import Task, load_task, task_of

CLASSES, ENTAILMENT, SCORES, CHOICES = map(task, TRANSFORMATIONS)
MCTEST = load_task("mctest")


def read(one: Task, folder: Path, content: str | bytes) -> list[Example]:
    data = content.encode() if isinstance(content, str) else content
    (folder / "train").write_bytes(data)
    return read_split(one, folder, "train")


def in_short(value: object) -> str:
    """What names a case in pytest's output."""
    return str(value)[-24:]


@pytest.mark.parametrize("kind", TRANSFORMATIONS)
def test_each_split_holds_its_examples_in_order(kind: str, tmp_path: Path) -> None:
    folder = write_data(kind, tmp_path, (30, 20, 10))
    for seed, (split, count) in enumerate((("train", 30), ("validation", 20), ("test", 10))):
        assert read_split(task(kind), folder, split) == examples(kind, count, seed)


def test_tsv_takes_quotes_as_letters_and_columns_by_name_or_number(tmp_path: Path) -> None:
    content = '\ufefflabel\tother\ttext\r\n-\tx\t"a, b\r\n\r\n+\ty\tc"\u2028d\n'
    assert read(CLASSES, tmp_path, content) == [
        Example(('"a, b',), (), 0),
        Example(('c"\u2028d',), (), 1),
    ]
    numbered = dataclasses.replace(CLASSES, texts=(2,), label=0)
    assert read(numbered, tmp_path, content) == read(CLASSES, tmp_path, content)


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(st.lists(st.tuples(CELL, CELL, st.sampled_from("enc")), min_size=1, max_size=5))
def test_csv_is_what_the_standard_library_writes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "train").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("premise", "hypothesis", "label"), *rows])
    found = read_split(ENTAILMENT, folder, "train")
    assert found == [Example((one, other), (), "enc".index(label)) for one, other, label in rows]


@given(st.lists(st.tuples(CELL, st.lists(CELL, min_size=2, max_size=4)), min_size=1, max_size=4))
def test_jsonl_holds_a_list_of_choices_or_a_key_for_each(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("jsonl")
    objects = [{"story": story, "endings": ends, "right": len(ends) - 1} for story, ends in rows]
    lines = "\n\n".join(map(json.dumps, objects))
    found = read(CHOICES, folder, lines)
    assert found == [Example((story,), tuple(ends), len(ends) - 1) for story, ends in rows]
    apart = dataclasses.replace(CHOICES, choices=("a", "b"))
    content = '{"story": "s", "a": "x", "b": 2, "right": "1"}'
    assert read(apart, folder, content) == [Example(("s",), ("x", "2"), 1)]


def test_letters_of_choices_stand_for_their_numbers(tmp_path: Path) -> None:
    letters = dataclasses.replace(CHOICES, labels={"A": "0", "B": "1"})
    content = '{"story": "s", "endings": ["x", "y"], "right": "B"}'
    assert read(letters, tmp_path, content) == [Example(("s",), ("x", "y"), 1)]
    with pytest.raises(ValueError, match="has the label 'C', one of A, B is wanted"):
        read(letters, tmp_path, content.replace('"B"', '"C"'))
    with pytest.raises(ValueError, match="labels of a choice stand for numbers from 0"):
        dataclasses.replace(CHOICES, labels={"A": "first"})


def test_a_test_part_may_lack_its_answers(tmp_path: Path) -> None:
    task = dataclasses.replace(ENTAILMENT, files={"train": "train", "test": "test"})
    (tmp_path / "test").write_text("premise,hypothesis\na,b\n")
    assert read_split(task, tmp_path, "test") == [Example(("a", "b"), (), None)]
    (tmp_path / "train").write_text("premise,hypothesis\na,b\n")
    with pytest.raises(ValueError, match="has no column 'label' in line 2"):
        read_split(task, tmp_path, "train")


def test_jsonl_labels_are_compared_as_json_writes_them(tmp_path: Path) -> None:
    content = {
        "transformation": "classification", "metrics": ["f1"], "format": "jsonl", "texts": ["t"],
        "files": {"train": "train"}, "labels": {"true": "yes", "1": "yes", "no": "no"},
    }  # fmt: skip
    lines = '{"t": 1.5, "label": true}\n{"t": "b", "label": 1}\n{"t": "c", "label": "no"}\n'
    found = read(task_of("own", content), tmp_path, lines)
    assert found == [Example(("1.5",), (), 0), Example(("b",), (), 0), Example(("c",), (), 1)]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("classification", "text\tlabel\na\t-\nb\t?\n", r"train, line 3 has the label '\?', one o"),
        ("classification", "text\tlabel\na\t-\tb\n", "has 3 columns in line 2, but 2 names"),
        ("classification", "label\n-\n", "train has no column 'text' in line 2$"),
        ("classification", "text\tlabel\n", r"the train part, .*train, has no examples$"),
        ("classification", "", r"the train part, .*train, has no examples$"),
        ("classification", b"text\tlabel\ncaf\xe9\t-\n", "train is not UTF-8 text"),
        ("entailment", 'premise,hypothesis,label\n"a\nb",c,e\nd,e,f\n', "line 4 has the label 'f'"),
        ("entailment", f"premise,hypothesis,label\n{'a' * 2**18},b,e\n", "is not CSV .*limit"),
        ("similarity", "one\tother\tscore\na\tb\t4.5\n", "'4.5', a number from 0 to 4 is wanted"),
        ("similarity", "one\tother\tscore\na\tb\t-0.1\n", "'-0.1', a number from 0 to 4 is wanted"),
        ("similarity", "one\tother\tscore\na\tb\tmany\n", "'many', a number from 0 to 4 is wanted"),
        ("similarity", "one\tother\tscore\na\tb\tnan\n", "'nan', a number from 0 to 4 is wanted"),
        (
            "choice",
            '{"story": "a", "endings": [1, 2], "right": 0}\nb\n',
            "has no JSON in line 2",
        ),
        ("choice", "[1]", "has no object in line 1"),
        (
            "choice",
            '{"story": "a", "endings": [1, 2], "right": 2}',
            "'2', a choice from 0 to 1 is",
        ),
        (
            "choice",
            '{"story": "a", "endings": [1, 2], "right": -1}',
            "'-1', a choice from 0 to 1",
        ),
        (
            "choice",
            '{"story": "a", "endings": [1, 2], "right": "B"}',
            "'B', a choice from 0 to 1",
        ),
        ("choice", '{"story": "a", "endings": [1, 2]}', "has no column 'right' in line 1"),
        (
            "choice",
            '{"story": "a", "endings": ["b"], "right": 0}',
            "line 1 has 1 choices, at least",
        ),
        (
            "choice",
            '{"story": null, "endings": [1, 2], "right": 0}',
            "has null in line 1, a text",
        ),
        ("choice", '{"story": "a", "endings": [[]], "right": 0}', r"has \[\] in line 1, a text"),
    ],
    ids=in_short,
)
def test_a_broken_line_is_refused_in_one_sentence(
    kind: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(task(kind), tmp_path, content)
    assert str(caught.value).startswith("data: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data: .*validation does not exist"):
        read_split(CLASSES, tmp_path, "validation")
    with pytest.raises(FileNotFoundError, match=r"mc500\.train\.statements\.tsv does not exist"):
        read_split(MCTEST, tmp_path, "train")


# MCTest


def story(text: str, questions: int = 4) -> str:
    columns = ["mc.0", "Author: 1", text]
    for question in range(questions):
        columns += [f"one: {question}?", *(f"{question}{letter}" for letter in "abcd")]
    return "\t".join(columns)


def write_mctest(folder: Path, stories: str | bytes, letters: str) -> None:
    data = stories.encode() if isinstance(stories, str) else stories
    (folder / "mc500.train.statements.tsv").write_bytes(data)
    (folder / "mc500.train.ans").write_text(letters)


def test_mctest_has_four_questions_for_each_story(tmp_path: Path) -> None:
    stories = story(r"A \newline b\tab c") + "\n" + story("D\u2028d") + "\n"
    write_mctest(tmp_path, stories, "A\tB\tC\tD\nD\tD\tA\tB\n")
    found = read_split(MCTEST, tmp_path, "train")
    assert [one.texts for one in found] == [("A \n b\t c",)] * 4 + [("D\u2028d",)] * 4
    assert [one.target for one in found] == [0, 1, 2, 3, 3, 3, 0, 1]
    assert found[1].choices == ("1a", "1b", "1c", "1d")


@pytest.mark.parametrize(
    ("stories", "letters", "message"),
    [
        (story("a"), "A\tB\tC\tE", r"\.ans, line 1 has the label 'E', one of A, B, C, D is wanted"),
        (story("a"), "A\tB\tC\tAB", r"\.ans, line 1 has the label 'AB', one of A, B, C, D is"),
        (story("a"), "A\tB\tC", r"tsv, line 1 is not a story with 4 questions of 4 statements"),
        (story("a", 3), "A\tB\tC\tD", r"tsv, line 1 is not a story with 4 questions"),
        (story("a"), "A\tB\tC\tD\nA\tB\tC\tD", r"has 1 stories, mc500\.train\.ans 2"),
        (story("caf\u00e9").encode("latin-1"), "A\tB\tC\tD", r"statements\.tsv is not UTF-8 text"),
    ],
    ids=in_short,
)
def test_a_broken_mctest_is_refused_in_one_sentence(
    stories: Any, letters: str, message: str, tmp_path: Path
) -> None:
    write_mctest(tmp_path, stories, letters)
    with pytest.raises(ValueError, match=message) as caught:
        read_split(MCTEST, tmp_path, "train")
    assert str(caught.value).startswith("data: ")
