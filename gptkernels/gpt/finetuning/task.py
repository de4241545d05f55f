"""Tasks: what a data set asks, as a small TOML file. Those in tasks/ come with the package; one of
a user's own is named by its path.

    transformation = "classification"     or entailment, similarity, choice (transformations.py)
    metrics = ["accuracy", "f1"]          the first one decides which checkpoint is the best
    format = "tsv"                        or csv, jsonl, mctest (gpt/rows.py)
    texts = ["premise", "hypothesis"]     columns: names, or numbers that count from 0
    label = "label"                       a column, which the test part may lack; where the answer
                                          is a number, `range` bounds it
    choices = ["a", "b", "c"]             columns, for "choice"; the label counts them from 0, or
                                          [labels] says what it stands for: A = "0"
    folder = "snli"                       where the files are, below the folder of all data
    [labels]                              what stands in the file = what it is called
    [files]                               train, and validation and test where there are any
    [zero_shot]                           how a model without fine-tuning is asked (zero_shot.py)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptkernels.core.names import check_name
from gptkernels.gpt import task_files
from gptkernels.gpt.finetuning import task_keys
from gptkernels.gpt.rows import Column

_OWN = Path(__file__).parent / "tasks"
TRANSFORMATIONS = ("classification", "entailment", "similarity", "choice")
FORMATS = ("tsv", "csv", "jsonl", "mctest")
SPLITS = ("train", "validation", "test")
CLASS_METRICS = ("accuracy", "f1", "matthews")
SCORE_METRICS = ("pearson", "spearman")
_TEXTS = {"classification": 1, "entailment": 2, "similarity": 2}


@dataclass(frozen=True)
class ZeroShot:
    """How a language model answers without fine-tuning (section 5 of GPT-1's paper).

    Fields:
        prompt: put after the text.
        answers: what may follow, one for each label; for "choice" the choices themselves.
    """

    prompt: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A data set and what it asks. Raises ValueError for a description that makes no sense.

    Fields: as in the file (see the module); `name` is the file's.
    """

    name: str
    transformation: str
    metrics: tuple[str, ...]
    format: str
    files: Mapping[str, str]
    texts: tuple[Column, ...] = ()
    choices: tuple[Column, ...] = ()
    label: Column = "label"
    labels: Mapping[str, str] = field(default_factory=dict)
    range: tuple[float, float] | None = None
    folder: str = ""
    zero_shot: ZeroShot | None = None

    def __post_init__(self) -> None:
        self._one_of("transformation", self.transformation, TRANSFORMATIONS)
        self._one_of("format", self.format, FORMATS)
        for split in self.files:
            self._one_of("a split in files", split, SPLITS)
        if "train" not in self.files:
            raise ValueError(f"task {self.name}: files must name the train part")
        if self.choice and self.range:
            raise ValueError(f"task {self.name}: a choice has no range")
        if self.choice and not all(map(_is_count, self.labels.values())):
            raise ValueError(f"task {self.name}: labels of a choice stand for numbers from 0")
        if not self.choice and bool(self.labels) == bool(self.range):
            raise ValueError(f"task {self.name}: either labels or a range is wanted")
        if self.labels and len(set(self.labels.values())) < 2:
            raise ValueError(f"task {self.name}: labels must name at least two classes")
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError(f"task {self.name}: range must be [lowest, highest]")
        if not self.metrics:
            raise ValueError(f"task {self.name}: metrics must name at least one")
        for metric in self.metrics:
            kinds = SCORE_METRICS if self.range else CLASS_METRICS
            self._one_of("a metric", metric, ("accuracy",) if self.choice else kinds)
        if self.format != "mctest":
            self._check_columns()
        elif not self.choice or self.texts or self.choices or self.labels:
            raise ValueError(
                f"task {self.name}: format mctest holds choices, in columns and letters of its own"
            )
        answers = self.zero_shot.answers if self.zero_shot else ()
        wanted = 0 if self.choice else len(self.classes)
        if self.zero_shot and (self.range or len(answers) != wanted):
            raise ValueError(
                f"task {self.name}: zero_shot needs an answer for each of the {wanted} classes"
            )

    @property
    def choice(self) -> bool:
        """Whether an example has choices of its own."""
        return self.transformation == "choice"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, whose places are the class indices; empty for a range and for
        choices."""
        return () if self.choice else tuple(dict.fromkeys(self.labels.values()))

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for a sequence."""
        return len(self.classes) or 1

    def data_folder(self, data: str | Path | None) -> Path:
        """The folder of the task's files: `data`, or `folder` in the one that the environment
        variable GPTKERNELS_DATA names.

        Raises FileNotFoundError where neither says, and where the folder does not exist.
        """
        return task_files.data_folder(data, self.folder, self.files["train"])

    def _check_columns(self) -> None:
        wanted = _TEXTS.get(self.transformation)
        if wanted is not None and len(self.texts) != wanted:
            raise ValueError(
                f"task {self.name}: {self.transformation} needs {wanted} texts, "
                f"got {len(self.texts)}"
            )
        if self.choice and not (self.texts and self.choices):
            raise ValueError(f"task {self.name}: choice needs texts and choices")
        if not self.choice and self.choices:
            raise ValueError(f"task {self.name}: choices are for the transformation choice")

    def _one_of(self, what: str, value: str, names: tuple[str, ...]) -> None:
        check_name(f"task {self.name}: {what}", value, names)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


def names() -> tuple[str, ...]:
    """The tasks that come with the package."""
    return task_files.names(_OWN)


def load_task(name: str | Path) -> Task:
    """The task called `name`, or described by the TOML file at this path.

    Raises ValueError for an unknown name and for a file that describes no task, FileNotFoundError
    for a path that is not there.
    """
    return task_of(*task_files.read(_OWN, name))


def task_of(name: str, content: Mapping[str, Any]) -> Task:
    """The task that `content`, a file's or that of `as_dict`, describes. Raises ValueError."""
    task_keys.check(name, content)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    if "zero_shot" in given:
        asked = given["zero_shot"]
        given["zero_shot"] = ZeroShot(asked.get("prompt", ""), tuple(asked.get("answers", ())))
    return Task(name=name, **given)


def as_dict(task: Task) -> dict[str, Any]:
    """What `task_of` reads, of JSON's types."""
    content = dataclasses.asdict(task)
    del content["name"]
    return {key: value for key, value in content.items() if value is not None}
