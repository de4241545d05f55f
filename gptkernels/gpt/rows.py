"""The rows of a data file: for each, its number in the file and its columns.

tsv      columns between tabs, names in the first line; quotes are letters, as GLUE has them
csv      as spreadsheets write it, names in the first line
jsonl    an object a line, whose keys are the columns
lines    each line is the column "text"; blank lines are left out
mctest   NAME.statements.tsv and NAME.ans, a row for each of a story's four questions: "story",
         "question", "choices" (four statements) and "label" (the letter of the right one)
cbt      the Children's Book Test: 20 numbered sentences ("context", a line each), a 21st with a
         blank XXXXX ("question"), the word that it stands for ("label"), ten "choices"
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

Column = str | int
Row = tuple[int, dict[Any, Any]]

FORMATS = ("tsv", "csv", "jsonl", "lines", "mctest", "cbt")
LETTERS = ("A", "B", "C", "D")
_QUESTIONS = 4  # of a story of MCTest


def rows(kind: str, path: Path) -> Iterator[Row]:
    """The rows of a file of this format; of tsv and csv, columns have numbers too, from 0.

    Raises FileNotFoundError for a missing file and ValueError, with the line, for one that is not
    of the format.
    """
    if kind == "mctest":
        yield from _mctest(path)
        return
    try:
        with present(path).open(
            encoding="utf-8-sig", newline="" if kind == "csv" else "\n"
        ) as file:
            match kind:
                case "jsonl":
                    yield from _objects(path, file)
                case "lines":
                    texts = ((i, line.rstrip("\r\n")) for i, line in enumerate(file, 1))
                    yield from ((i, {"text": text}) for i, text in texts if text.strip())
                case "cbt":
                    yield from _cbt(path, file)
                case _:
                    yield from _table(kind, path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise ValueError(f"data: {path} is not CSV that can be read ({error})") from None


def present(path: Path) -> Path:
    """`path`; FileNotFoundError where it is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist")
    return path


def column(path: Path, line: int, row: dict[Any, Any], key: Column) -> Any:
    """What a row holds in a column. Raises ValueError where it has none of this name."""
    if key not in row:
        raise ValueError(f"data: {path} has no column {key!r} in line {line}")
    return row[key]


def text_of(path: Path, line: int, value: Any) -> str:
    """A column's value as text, a number's as JSON writes it. Raises ValueError for a list, an
    object and null."""
    if value is None or isinstance(value, list | dict):
        raise ValueError(
            f"data: {path} has {json.dumps(value)} in line {line}, a text or number is wanted"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _table(kind: str, path: Path, file: TextIO) -> Iterator[Row]:
    lines = _numbered(kind, file)
    _, names = next(lines, (1, []))
    for number, row in lines:
        if not any(row):
            continue
        if len(row) != len(names):
            raise ValueError(
                f"data: {path} has {len(row)} columns in line {number}, but {len(names)} "
                "names in its first"
            )
        by_number: dict[Any, str] = dict(enumerate(row))
        yield number, by_number | dict(zip(names, row, strict=True))


def _numbered(kind: str, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The columns of each row, and the line that the row ends in: in CSV it may have several."""
    if kind == "csv":
        reader = csv.reader(file)
        yield from ((reader.line_num, row) for row in reader)
    else:
        yield from ((i, line.rstrip("\r\n").split("\t")) for i, line in enumerate(file, 1))


def _objects(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path} has no JSON in line {number} ({error.msg})") from None
        if not isinstance(row, dict):
            raise ValueError(f"data: {path} has no object in line {number}")
        yield number, row


def _cbt(path: Path, file: TextIO) -> Iterator[Row]:
    sentences: list[str] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place, _, sentence = line.rstrip("\r\n").partition(" ")
        if place != str(len(sentences) + 1):
            raise ValueError(
                f"data: {path}, line {number} is not sentence {len(sentences) + 1} of its question"
            )
        if place != "21":
            sentences.append(sentence)
            continue
        columns = sentence.split("\t")
        if len(columns) != 4 or "XXXXX" not in columns[0]:
            raise ValueError(
                f"data: {path}, line {number} is not a sentence with XXXXX, its word and choices"
            )
        question, word, _, choices = columns
        yield (
            number,
            {
                "context": "\n".join(sentences),
                "question": question,
                "label": word,
                "choices": choices.split("|"),
            },
        )
        sentences = []
    if sentences:
        raise ValueError(f"data: {path} ends within a question")


def _mctest(path: Path) -> Iterator[Row]:
    folder, name = path.parent, path.name
    stories, answers = (present(folder / f"{name}{end}") for end in (".statements.tsv", ".ans"))
    lines = _lines(stories)
    right = [line.split() for line in _lines(answers)]
    if len(lines) != len(right):
        raise ValueError(f"data: {stories} has {len(lines)} stories, {answers.name} {len(right)}")
    for number, (line, letters) in enumerate(zip(lines, right, strict=True), 1):
        columns, step = line.split("\t"), 1 + len(LETTERS)
        if len(columns) != 3 + _QUESTIONS * step or len(letters) != _QUESTIONS:
            raise ValueError(
                f"data: {stories}, line {number} is not a story with {_QUESTIONS} questions of "
                f"{len(LETTERS)} statements and their letters"
            )
        story = columns[2].replace("\\newline", "\n").replace("\\tab", "\t")
        for place, letter in enumerate(letters):
            if letter not in LETTERS:
                raise ValueError(
                    f"data: {answers}, line {number} has the label {letter!r}, one of "
                    f"{', '.join(LETTERS)} is wanted"
                )
            question, *choices = columns[3 + place * step :][:step]
            _, _, question = question.partition(": ")  # "one: ", "multiple: "
            yield (
                number,
                {
                    "story": story,
                    "question": question,
                    "choices": choices,
                    "label": letter,
                },
            )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error.reason})") from None
