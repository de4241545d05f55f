"""The examples of a task, as texts: what is asked, and what may be answered.

    kind         prompt                       answers
    choice       the prompt                   each candidate, in the template `answer`
    cloze        the text before the blank    each choice with the text behind the blank
    last-word    the text before its last word    that word
    generation   the prompt                   each reference, in the template `answer`

An answer takes the space before it along, so that it begins a word as it does within a text.
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
        group: what stands in the task's column `group`; "" where it names none.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int = 0
    group: str = ""


def read_examples(task: Task, folder: Path, split: str) -> list[Example]:
    """The examples of "train", "validation" or "test".

    Raises FileNotFoundError for a missing file, and ValueError, with the line, for a column that is
    not there, a label outside the set, a text without its blank or its last word; and for a split
    that the task does not have, or that has no examples.
    """
    if split not in task.files:
        raise ValueError(f"task {task.name} has no {split} part, only {', '.join(task.files)}")
    path = folder / task.files[split]
    examples = [_Reader(task, path, line, row).example() for line, row in rows(task.format, path)]
    if not examples:
        raise ValueError(f"data: the {split} part, {path}, has no examples")
    return examples


@dataclass(frozen=True)
class _Reader:
    task: Task
    path: Path
    line: int
    row: dict[Any, Any]

    def example(self) -> Example:
        task = self.task
        text = task.prompt.fill(lambda key: self._plain(self._text(key)))
        group = "" if task.group is None else self._text(task.group)
        if task.kind == "cloze":
            before, blank, rest = text.partition(task.blank)
            if not blank:
                raise self._wrong(f"has no {task.blank}")
            return self._asked(before, lambda word: word + rest, self._list(task.choices), group)
        if task.kind == "last-word":
            words = text.rstrip().rsplit(None, 1)
            if len(words) < 2:
                raise self._wrong("has fewer than two words")
            before = text.rstrip().removesuffix(words[1])
            return self._asked(before, lambda word: word, (words[1],), group)
        if task.kind == "generation":
            answers = self._list(task.references)
        elif task.choices:
            answers = self._list(task.choices)
        else:
            answers = tuple(dict.fromkeys(task.labels.values()))

        def written(word: str) -> str:
            return task.answer.fill(lambda _: word)

        return self._asked(text, written, answers, group)

    def _asked(
        self, text: str, written: Callable[[str], str], words: tuple[str, ...], group: str
    ) -> Example:
        """`written`: from a word to the answer behind the text."""
        right = self._right(words)
        prompt = text.rstrip()
        gap = text[len(prompt) :]
        answers = tuple(written(self._plain(word)) for word in words)
        answers = tuple(one if one[:1].isspace() else gap + one for one in answers)
        return Example(prompt, answers, right, group)

    def _right(self, words: tuple[str, ...]) -> int:
        """The place of the right answer among `words`."""
        task = self.task
        if task.label is None:
            return 0
        label = self._text(task.label)
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

    def _text(self, key: Column) -> str:
        value = column(self.path, self.line, self.row, key)
        return text_of(self.path, self.line, value)

    def _list(self, keys: tuple[Column, ...]) -> tuple[str, ...]:
        values = [column(self.path, self.line, self.row, key) for key in keys]
        if len(values) == 1 and isinstance(values[0], list):
            (values,) = values
        least = 1 if self.task.kind == "generation" else 2
        if len(values) < least:
            raise self._wrong(f"has {len(values)} answers, at least {least} are wanted")
        return tuple(text_of(self.path, self.line, value) for value in values)

    def _plain(self, text: str) -> str:
        if not self.task.detokenizer:
            return text
        found = detokenise(self.task.detokenizer, text)
        return text if found.kept else found.text  # a prompt has no use for the mark of such lines

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"data: {self.path}, line {self.line} {what}")
