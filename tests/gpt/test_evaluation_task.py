"""Tasks that are asked by prompts: templates, descriptions, and the examples read by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import DATA

from gptkernels.gpt.evaluation.examples import Example, read_rows
from gptkernels.gpt.evaluation.task import Task, load_task, names
from gptkernels.gpt.evaluation.template import Template

CHOICE: dict[str, Any] = {
    "kind": "choice",
    "format": "jsonl",
    "prompt": "Text: {text}\nMood:",
    "label": "mood",
    "labels": {"+": "good", "-": "bad"},
    "files": {"train": "train.jsonl", "test": "test.jsonl"},
}
CLOZE: dict[str, Any] = {
    "kind": "cloze",
    "format": "jsonl",
    "prompt": "{before} {text}",
    "blank": "XXX",
    "choices": ["choices"],
    "label": "word",
    "files": {"test": "test.jsonl"},
}
LAST: dict[str, Any] = {
    "kind": "last-word", "format": "lines", "prompt": "{text}", "files": {"test": "test.txt"},
}  # fmt: skip
FREE: dict[str, Any] = {
    "kind": "generation",
    "format": "csv",
    "prompt": "{en} =",
    "references": ["fr", "fr2"],
    "files": {"validation": "dev.csv"},
}


def written(folder: Path, content: dict[str, Any]) -> Path:
    """The task as a TOML file."""
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in content.items() if k not in tables]
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    path = folder / "mine.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def made(folder: Path, content: dict[str, Any]) -> Task:
    return load_task(written(folder, content))


def read_examples(task: Task, folder: Path, split: str) -> list[Example]:
    return [row.example() for row in read_rows(task, folder, split)]


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_each_task_of_the_package_can_be_read() -> None:
    tasks = {name: load_task(name) for name in names()}
    assert set(names()) >= {
        "cbt-cn", "cbt-ne", "coqa", "lambada", "mctest", "sick-entailment", "sst-2", "tldr",
        "translation-en-fr", "translation-fr-en",
    }  # fmt: skip
    assert {task.kind for task in tasks.values()} == {
        "choice", "cloze", "last-word", "generation",
    }  # fmt: skip
    assert tasks["tldr"].prompt.text.endswith("TL;DR:")  # GPT-2's paper, section 3.6
    assert tasks["translation-en-fr"].prompt.text == "{en} ="  # section 3.7
    assert tasks["sst-2"].asked == "test"
    assert tasks["coqa"].asked == "validation"


def test_a_template_is_filled_by_names_and_numbers() -> None:
    template = Template("{a} {{b}} {1}{a}!")
    assert template.fields == ("a", 1, "a")
    assert template.fill(lambda column: f"<{column}>") == "<a> {b} <1><a>!"


@pytest.mark.parametrize("text", ["{", "{a!r}", "{a:>3}", "{a.b}", "{a[0]}", "{}", "a}"])
def test_what_is_no_template_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is no template"):
        Template(text)
    with pytest.raises(ValueError, match=r"task mine: prompt .* is no template"):
        made(tmp_path, CHOICE | {"prompt": text})


@pytest.mark.parametrize(
    ("content", "change", "wrong"),
    [
        (CHOICE, {"kind": "choise"}, "kind must be one of choice, cloze, last-word, generation"),
        (CHOICE, {"format": "xml"}, "format must be one of tsv"),
        (CHOICE, {"prompt": "{text} {mood}"}, "the prompt holds the answer, mood"),
        (FREE, {"prompt": "{en} {fr2} ="}, "the prompt holds the answer, fr2"),
        (CHOICE, {"label": None}, "label is missing"),
        (CHOICE, {"labels": None}, r"either choices or \[labels\] is wanted"),
        (CHOICE, {"labels": {"+": "good", "-": "good"}}, r"\[labels\] name fewer than two"),
        (CHOICE, {"choices": ["a", "b"]}, "labels of choices stand for numbers"),
        (CHOICE, {"answer": "{word}"}, "answer must hold {answer}"),
        (CHOICE, {"normalise": "bytes"}, "normalise must be one of none, tokens, unconditional"),
        (CHOICE, {"normalise": "unconditional"}, "unconditional is missing"),
        (CHOICE, {"blank": "XXX"}, "blank is of kind cloze alone"),
        (CHOICE, {"metrics": ["f1"]}, "metrics is of kind generation alone"),
        (CHOICE, {"files": {"train": "a"}}, "files name no test part"),
        (CHOICE, {"files": {"dev": "a"}}, "a split in files must be one of train, validation"),
        (CHOICE, {"detokenizer": "moses"}, "detokenizer must be one of"),
        (CHOICE, {"prompt": None}, "prompt is missing"),
        (CHOICE, {"shots": 3}, "shots is not known there"),
        (CHOICE, {"choices": "a"}, "choices must be a list"),
        (CLOZE, {"blank": None}, "blank is missing"),
        (CLOZE, {"choices": None}, "choices are missing"),
        (CLOZE, {"normalise": "tokens"}, "normalise is of kind choice alone"),
        (FREE, {"references": None}, "references are missing"),
        (FREE, {"metrics": ["rouge"]}, "a metric must be one of exact, f1, bleu"),
        (FREE, {"metrics": []}, "metrics must name at least one"),
        (FREE, {"stop": [""]}, "stop must hold no empty string"),
        (FREE, {"max_new_tokens": 0}, "max_new_tokens must be a number of at least 1"),
    ],
)
def test_a_description_that_makes_no_sense(
    tmp_path: Path, content: dict[str, Any], change: dict[str, Any], wrong: str
) -> None:
    changed = {key: value for key, value in (content | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"task mine: {wrong}"):
        made(tmp_path, changed)


def test_a_choice_between_labels(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE)
    jsonl(tmp_path / "test.jsonl", {"text": "fine", "mood": "+"}, {"text": 2.5, "mood": "-"})
    assert read_examples(task, tmp_path, "test") == [
        Example("Text: fine\nMood:", (" good", " bad"), 0),
        Example("Text: 2.5\nMood:", (" good", " bad"), 1),
    ]


def test_a_choice_between_an_examples_own_answers(tmp_path: Path) -> None:
    change = {"choices": ["list"], "labels": {"A": "0", "B": "1"}, "prompt": "{text}  "}
    task = made(tmp_path, CHOICE | change | {"answer": "{answer}.", "group": "book"})
    row = {"text": "who?", "list": ["me", "you", "they"], "mood": "B", "book": 7}
    jsonl(tmp_path / "test.jsonl", row)
    (example,) = read_examples(task, tmp_path, "test")
    # The space at the prompt's end begins the answers.
    assert example == Example("who?", ("  me.", "  you.", "  they."), 1)
    assert read_rows(task, tmp_path, "test")[0].group == "7"
    # Without [labels], the label is the number itself. An answer that begins with a space of its
    # own needs no other.
    task = made(tmp_path, CHOICE | change | {"labels": {}})
    jsonl(tmp_path / "test.jsonl", row | {"mood": 2})
    (example,) = read_examples(task, tmp_path, "test")
    assert example == Example("who?", (" me", " you", " they"), 2)


def test_an_answer_that_begins_a_line_has_no_space_before_it(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE | {"prompt": "{text}\nMood:\n"})
    jsonl(tmp_path / "test.jsonl", {"text": "fine", "mood": "-"})
    assert read_examples(task, tmp_path, "test") == [Example("fine\nMood:\n", ("good", "bad"), 1)]


def test_what_stands_behind_a_field_that_is_cut(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE | {"prompt": "{{T}} {text} {{of}} {by}: ", "cut": "text"})
    jsonl(tmp_path / "test.jsonl", {"text": "a b", "by": "me", "mood": "-"})
    (example,) = read_examples(task, tmp_path, "test")
    assert (example.prompt, example.kept) == ("{T} a b {of} me:", " {of} me:")
    with pytest.raises(ValueError, match="cut must name a field of the prompt"):
        made(tmp_path, CHOICE | {"cut": "mood"})


def test_a_line_that_cannot_be_joined_stays_and_is_counted(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE | {"detokenizer": "ptb", "prompt": "{text}"})
    text = "it 's fine .\n\\ it's fine.\nis n't it ?"
    jsonl(tmp_path / "test.jsonl", {"text": text, "mood": "-"})
    (example,) = read_examples(task, tmp_path, "test")
    assert example.prompt == "it's fine.\n\\ it's fine.\nisn't it?"
    assert example.unjoined == 1


def test_data_lies_beside_a_users_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTKERNELS_DATA", raising=False)
    assert made(tmp_path, CHOICE).data_folder(None) == tmp_path
    (tmp_path / "inside").mkdir()
    assert made(tmp_path, CHOICE | {"folder": "inside"}).data_folder(None) == tmp_path / "inside"
    with pytest.raises(FileNotFoundError, match="GPTKERNELS_DATA"):
        load_task("sst-2").data_folder(None)


def test_a_cloze_goes_on_behind_its_blank(tmp_path: Path) -> None:
    task = made(tmp_path, CLOZE)
    row = {"before": "Once.", "text": "The XXX ran off.", "choices": ["cat", "dog"], "word": "dog"}
    jsonl(tmp_path / "test.jsonl", row)
    (example,) = read_examples(task, tmp_path, "test")
    assert example == Example("Once. The", (" cat ran off.", " dog ran off."), 1)


def test_the_last_word_of_a_line(tmp_path: Path) -> None:
    task = made(tmp_path, LAST)
    (tmp_path / "test.txt").write_text("the end\n\nof a  tale \n", encoding="utf-8")
    found = read_examples(task, tmp_path, "test")
    assert found == [Example("the", (" end",)), Example("of a", ("  tale",))]


def test_references_of_free_answers(tmp_path: Path) -> None:
    task = made(tmp_path, FREE)
    (tmp_path / "dev.csv").write_text('en,fr,fr2\n"a, b",un,deux\n', encoding="utf-8")
    assert read_examples(task, tmp_path, "validation") == [Example("a, b =", (" un", " deux"))]


def test_the_childrens_book_test(tmp_path: Path) -> None:
    story = "".join(f"{i} Sentence {i} .\n" for i in range(1, 21))
    last = "21 He did n't see the XXXXX .\tcow\t\tcow|sea|-LRB-\n\n"
    (tmp_path / "cbtest_CN_test_2500ex.txt").write_text((story + last) * 2, encoding="utf-8")
    found = read_examples(load_task("cbt-cn"), tmp_path, "test")
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0].prompt.endswith("Sentence 20.\nHe didn't see the")  # detokenised
    assert found[0].answers == (" cow.", " sea.", " (.")
    assert found[0].right == 0
    for broken in (story, story.replace("2 Sentence", "3 Sentence", 1), story + last[:20]):
        (tmp_path / "cbtest_CN_test_2500ex.txt").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"data: .*cbtest"):
            read_examples(load_task("cbt-cn"), tmp_path, "test")


def test_a_story_of_mctest_has_four_questions(tmp_path: Path) -> None:
    questions = [
        column
        for number in range(4)
        for column in (f"one: Who said: {number}?", *(f"{letter}{number}" for letter in "abcd"))
    ]
    line = "\t".join(("id", "author", "Once\\newlineupon.", *questions))
    (tmp_path / "mc500.test.statements.tsv").write_text(line + "\n")
    (tmp_path / "mc500.test.ans").write_text("A\tC\tD\tB\n")
    found = read_examples(load_task("mctest"), tmp_path, "test")
    assert found[1] == Example(
        "Once\nupon.\nQuestion: Who said: 1?\nAnswer:", (" a1", " b1", " c1", " d1"), 2
    )
    assert [example.right for example in found] == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("content", "row", "wrong"),
    [
        (CHOICE, {"mood": "+"}, "has no column 'text' in line 1"),
        (CHOICE, {"text": "a"}, "has no column 'mood' in line 1"),
        (CHOICE, {"text": "a", "mood": "?"}, r"line 1 has the label '\?', one of \+, - is wanted"),
        (CHOICE, {"text": None, "mood": "+"}, "has null in line 1"),
        (CLOZE, {"before": "", "text": "a", "choices": ["b", "c"], "word": "b"}, "has no XXX"),
        (
            CLOZE,
            {"before": "", "text": "XXX", "choices": ["b", "c"], "word": "d"},
            "has the label 'd', one of b, c is wanted",
        ),
        (
            CLOZE,
            {"before": "", "text": "XXX", "choices": ["b"], "word": "b"},
            "has 1 answers, at least 2 are wanted",
        ),
        (
            LAST | {"format": "jsonl", "files": {"test": "test.jsonl"}},
            {"text": " one "},
            "two words",
        ),
    ],
)
def test_an_example_that_makes_no_sense(
    tmp_path: Path, content: dict[str, Any], row: dict[str, Any], wrong: str
) -> None:
    jsonl(tmp_path / "test.jsonl", row)
    with pytest.raises(ValueError, match=rf"data: .*test\.jsonl.*{wrong}"):
        read_examples(made(tmp_path, content), tmp_path, "test")


def test_a_choice_beyond_the_last(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE | {"choices": ["a", "b"], "labels": {}})
    for mood in (2, -1, "x"):
        jsonl(tmp_path / "test.jsonl", {"text": "t", "a": "1", "b": "2", "mood": mood})
        with pytest.raises(ValueError, match="a choice from 0 to 1 is wanted"):
            read_examples(task, tmp_path, "test")


def test_parts_that_are_missing_or_empty(tmp_path: Path) -> None:
    task = made(tmp_path, CHOICE)
    with pytest.raises(ValueError, match="task mine has no validation part, only train, test"):
        read_examples(task, tmp_path, "validation")
    with pytest.raises(FileNotFoundError, match=r"data: .*test\.jsonl does not exist"):
        read_examples(task, tmp_path, "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"the test part, .* has no examples"):
        read_examples(task, tmp_path, "test")


@pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not there")
@pytest.mark.parametrize(("name", "count"), [("sst-2", 872), ("mctest", 600)])
def test_real_tasks(name: str, count: int) -> None:
    task = load_task(name)
    examples = read_examples(task, DATA / task.folder, "test")
    assert len(examples) == count
    assert all(0 <= one.right < len(one.answers) for one in examples)
    assert len({one.prompt for one in examples}) > 0.99 * count
