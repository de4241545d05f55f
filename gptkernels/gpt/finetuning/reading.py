"""The examples of a task, from the rows of its files (gpt/rows.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.finetuning.task import Task
from gptkernels.gpt.rows import LETTERS, column, rows, text_of


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
    path = folder / task.files[split]
    found = rows(task.format, path)
    if task.format == "mctest":
        examples = [
            Example((row["story"],), tuple(row["choices"]), LETTERS.index(row["label"]))
            for _, row in found
        ]
    else:
        examples = [_example(task, path, line, row, split == "test") for line, row in found]
    if not examples:
        raise ValueError(f"data: the {split} part, {path}, has no examples")
    return examples


def _example(task: Task, path: Path, line: int, row: Any, may_lack_label: bool) -> Example:
    def text(value: Any) -> str:
        return text_of(path, line, value)

    texts = tuple(text(column(path, line, row, key)) for key in task.texts)
    choices = [column(path, line, row, key) for key in task.choices]
    if len(choices) == 1 and isinstance(choices[0], list):
        (choices,) = choices
    answers = tuple(map(text, choices))
    where = f"{path}, line {line}"
    if task.choice and len(answers) < 2:
        raise ValueError(f"data: {where} has {len(answers)} choices, at least 2 are wanted")
    if may_lack_label and task.label not in row:
        return Example(texts, answers)
    return Example(
        texts,
        answers,
        _target(task, where, text(column(path, line, row, task.label)), len(answers)),
    )


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
