"""The examples of a task, as texts: what is asked, and what may be answered.

    kind         prompt                       answers
    choice       the prompt                   each candidate, in the template `answer`
    cloze        the text before the blank    each choice with the text behind the blank
    last-word    the text before its last word    that word
    generation   the prompt                   each reference, in the template `answer`

An answer takes the space before it along, so that it begins a word as it does within a text; behind
the end of a line it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.evaluation.detokenizers import detokenise
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.rows import Column, column, rows, text_of


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a task.

    Fields:
        prompt: what the model reads, without spaces at its end.
        answers: what may follow; of kind "generation" all are right.
        right: the place of the right answer.
        kept: the end of the prompt that stays where the task's `cut` field, which stands before it,
            loses its end; None where the prompt loses its beginning.
        unjoined: how many lines the detokeniser could not change.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int = 0
    kept: str | None = None
    unjoined: int = 0


def read_rows(task: Task, folder: Path, split: str) -> list[ExampleRow]:
    """The rows of "train", "validation" or "test", each of which is made an example when it is
    needed.

    Raises FileNotFoundError for a missing file, and ValueError for a file that is not of the task's
    format, for a split that the task does not have, and for one that has no examples.
    """
    if split not in task.files:
        raise ValueError(f"task {task.name} has no {split} part, only {', '.join(task.files)}")
    path = folder / task.files[split]
    found = [ExampleRow(task, path, line, row) for line, row in rows(task.format, path)]
    if not found:
        raise ValueError(f"data: the {split} part, {path}, has no examples")
    return found


@dataclass(frozen=True, slots=True)
class ExampleRow:
    """A row of a task's file, and where it stands."""

    task: Task
    path: Path
    line: int
    row: dict[Any, Any]

    @property
    def group(self) -> str:
        """What stands in the task's column `group`; "" where it names none."""
        return "" if self.task.group is None else self.text(self.task.group)

    def example(self) -> Example:
        """The example. Raises ValueError, with the line, for a column that is not there, a label
        outside the set, a text without its blank or its last word."""
        return _Reading(self).example()

    def text(self, key: Column) -> str:
        """What stands in a column. Raises ValueError where it is not there or holds no text."""
        value = column(self.path, self.line, self.row, key)
        return text_of(self.path, self.line, value)


class _Reading:
    """Makes a row an example, and counts the lines that its detokeniser could not change."""

    def __init__(self, row: ExampleRow) -> None:
        self._row, self._task = row, row.task
        self._unjoined = 0

    def example(self) -> Example:
        task = self._task
        if task.kind == "cloze":
            before, blank, rest = self._prompt().partition(task.blank)
            if not blank:
                raise self._wrong(f"has no {task.blank}")
            return self._asked(before, lambda word: word + rest, self._list(task.choices))
        if task.kind == "last-word":
            text = self._prompt().rstrip()
            words = text.rsplit(None, 1)
            if len(words) < 2:
                raise self._wrong("has fewer than two words")
            return self._asked(text.removesuffix(words[1]), lambda word: word, (words[1],))
        if task.kind == "generation":
            answers = self._list(task.references)
        elif task.choices:
            answers = self._list(task.choices)
        else:
            answers = tuple(dict.fromkeys(task.labels.values()))
        return self._asked(self._prompt(), lambda word: task.answer.fill(lambda _: word), answers)

    def _prompt(self) -> str:
        return self._task.prompt.fill(self._field)

    def _asked(self, text: str, written: Callable[[str], str], words: tuple[str, ...]) -> Example:
        """`written`: from a word to the answer behind the text."""
        right = self._right(words)
        prompt = text.rstrip(" ")
        gap = text[len(prompt) :]
        answers = []
        for word in words:
            answer = written(self._plain(word))
            if prompt.endswith("\n"):
                answer = answer.lstrip(" ")  # it begins a line
            answers.append(answer if answer[:1].isspace() else gap + answer)
        return Example(prompt, tuple(answers), right, self._kept(), self._unjoined)

    def _kept(self) -> str | None:
        cut = self._task.cut
        if cut is None:
            return None
        return self._task.prompt.behind(cut).fill(self._field).rstrip(" ")

    def _right(self, words: tuple[str, ...]) -> int:
        """The place of the right answer among `words`."""
        task = self._task
        if task.label is None:
            return 0
        label = self._row.text(task.label)
        if task.labels and label not in task.labels:
            raise self._wrong(f"has the label {label!r}, one of {', '.join(task.labels)} is wanted")
        label = task.labels.get(label, label)
        if task.kind == "cloze" or not task.choices:
            if label not in words:
                raise self._wrong(f"has the label {label!r}, one of {', '.join(words)} is wanted")
            return words.index(label)
        if not (label.isascii() and label.isdigit() and int(label) < len(words)):
            raise self._wrong(
                f"has the label {label!r}, a choice from 0 to {len(words) - 1} is wanted"
            )
        return int(label)

    def _field(self, key: Column) -> str:
        return self._plain(self._row.text(key))

    def _list(self, keys: tuple[Column, ...]) -> tuple[str, ...]:
        row = self._row
        values = [column(row.path, row.line, row.row, key) for key in keys]
        if len(values) == 1 and isinstance(values[0], list):
            (values,) = values
        least = 1 if self._task.kind == "generation" else 2
        if len(values) < least:
            raise self._wrong(f"has {len(values)} answers, at least {least} are wanted")
        return tuple(text_of(row.path, row.line, value) for value in values)

    def _plain(self, text: str) -> str:
        if not self._task.detokenizer:
            return text
        lines = []
        for line in text.split("\n"):
            found = detokenise(self._task.detokenizer, line) if line else None
            self._unjoined += bool(found and found.kept)
            # A prompt has no use for the mark of a line that stays.
            lines.append(found.text if found and not found.kept else line)
        return "\n".join(lines)

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"data: {self._row.path}, line {self._row.line} {what}")
