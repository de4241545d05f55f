"""The examples of a task, from its files.

tsv      columns between tabs, names in the first line; quotes are letters, as GLUE has them
csv      as spreadsheets write it, names in the first line
jsonl    an object a line; a column is a key, and for choices one key may hold the whole list
mctest   NAME.statements.tsv and NAME.ans: a story and four questions a line, each with the
         four answers as statements, and the letters of the right ones
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gptkernels.gpt.finetuning.task import Column, Task

_QUESTIONS, _CHOICES = 4, 4  # of MCTest's stories
_LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a task.

    Fields:
        texts: what it is about, 1 or 2 texts.
        choices: the answers to choose from, for the transformation "choice".
        target: the class's or the choice's index, or a number; None where it is not known.
    """

    texts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    target: float | None = None


def read_split(task: Task, folder: Path, split: str) -> list[Example]:
    """The examples of "train", "validation" or "test".

    Raises FileNotFoundError for a missing file, and ValueError, with the line, for a column that is
    not there, a label outside the set, a number outside the range, and for a part without examples.
    """
    name = task.files[split]
    if task.format == "mctest":
        examples = list(_mctest(folder, name))
    else:
        path = folder / name
        examples = [
            _example(task, path, line, row, split == "test")
            for line, row in _rows(task.format, _present(path))
        ]
    if not examples:
        raise ValueError(f"data: the {split} part, {folder / name}, has no examples")
    return examples


def _rows(kind: str, path: Path) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
    """The number of each line and its columns: by number and, from the first line, by name."""
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind == "csv" else "\n") as lines:
            if kind == "jsonl":
                yield from _objects(path, lines)
                return
            rows = _numbered(kind, lines)
            _, names = next(rows, (1, []))
            for number, row in rows:
                if not any(row):
                    continue
                if len(row) != len(names):
                    raise ValueError(
                        f"data: {path} has {len(row)} columns in line {number}, but {len(names)} "
                        "names in its first"
                    )
                by_number: dict[Any, str] = dict(enumerate(row))
                yield number, by_number | dict(zip(names, row, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise ValueError(f"data: {path} is not CSV that can be read ({error})") from None


def _numbered(kind: str, lines: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The columns of each row, and the line that the row ends in: in CSV it may have several."""
    if kind == "csv":
        reader = csv.reader(lines)
        yield from ((reader.line_num, row) for row in reader)
    else:
        yield from ((i, line.rstrip("\r\n").split("\t")) for i, line in enumerate(lines, 1))


def _objects(path: Path, lines: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path} has no JSON in line {number} ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"data: {path} has no object in line {number}")
        yield number, row


def _example(task: Task, path: Path, line: int, row: Any, may_lack_label: bool) -> Example:
    def column(key: Column) -> Any:
        if key not in row:
            raise ValueError(f"data: {path} has no column {key!r} in line {line}")
        return row[key]

    def text(value: Any) -> str:
        if value is None or isinstance(value, list | dict):
            raise ValueError(
                f"data: {path} has {json.dumps(value)} in line {line}, a text or number is wanted"
            )
        return value if isinstance(value, str) else json.dumps(value)

    texts = tuple(text(column(key)) for key in task.texts)
    choices = [column(key) for key in task.choices]
    if len(choices) == 1 and isinstance(choices[0], list):
        (choices,) = choices
    answers = tuple(map(text, choices))
    where = f"{path}, line {line}"
    if task.choice and len(answers) < 2:
        raise ValueError(f"data: {where} has {len(answers)} choices, at least 2 are wanted")
    if may_lack_label and task.label not in row:
        return Example(texts, answers)
    return Example(texts, answers, _target(task, where, text(column(task.label)), len(answers)))


def _target(task: Task, where: str, value: str, choices: int) -> float:
    if task.labels:
        if value not in task.labels:
            raise ValueError(
                f"data: {where} has the label {value!r}, one of {', '.join(task.labels)} is wanted"
            )
        value = task.labels[value]
        if not task.choice:
            return task.classes.index(value)
    low, high = (0, choices - 1) if task.range is None else task.range
    kind = "choice" if task.choice else "number"
    try:
        number = int(value) if task.choice else float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"data: {where} has the label {value!r}, a {kind} from {low:g} to {high:g} is wanted"
        )
    return number


def _mctest(folder: Path, name: str) -> Iterator[Example]:
    stories, answers = (_present(folder / f"{name}{end}") for end in (".statements.tsv", ".ans"))
    lines = _lines(stories)
    right = [line.split() for line in _lines(answers)]
    if len(lines) != len(right):
        raise ValueError(f"data: {stories} has {len(lines)} stories, {answers.name} {len(right)}")
    for number, (line, letters) in enumerate(zip(lines, right, strict=True), 1):
        columns = line.split("\t")
        if len(columns) != 3 + _QUESTIONS * (1 + _CHOICES) or len(letters) != _QUESTIONS:
            raise ValueError(
                f"data: {stories}, line {number} is not a story with {_QUESTIONS} questions of "
                f"{_CHOICES} statements and their letters"
            )
        story = columns[2].replace("\\newline", "\n").replace("\\tab", "\t")
        for question, letter in enumerate(letters):
            first = 4 + question * (1 + _CHOICES)
            if letter not in _LETTERS:
                raise ValueError(
                    f"data: {answers}, line {number} has the label {letter!r}, one of "
                    f"{', '.join(_LETTERS)} is wanted"
                )
            choices = tuple(columns[first : first + _CHOICES])
            yield Example((story,), choices, _LETTERS.index(letter))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error.reason})") from None


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist")
    return path
