"""A task, asked of a model: prompts, answers, and how good they are for each number of solved
examples in a prompt."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.evaluation import intervals, metrics
from gptkernels.gpt.evaluation.asking import (
    Answer,
    check_settings,
    chosen,
    normalisation,
    written,
)
from gptkernels.gpt.evaluation.config import TaskConfig
from gptkernels.gpt.evaluation.examples import Example, ExampleRow, read_rows
from gptkernels.gpt.evaluation.intervals import Interval
from gptkernels.gpt.evaluation.likelihood import Counts
from gptkernels.gpt.evaluation.perplexity import exponential
from gptkernels.gpt.evaluation.prompts import Asked, Prompt, Prompter
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import Task

Observer = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is done, 0 to 1."""


@dataclass(frozen=True)
class Outcome:
    """How a model did with one number of solved examples in its prompts.

    Fields:
        shots: that number; prompts may hold fewer, where not all fit.
        metrics: name -> value. accuracy; perplexity of the last word; or the task's own.
        intervals: name -> the bounds of its 95% bootstrap interval over the examples.
        answers: one for each example that was asked, in the order of `Evaluation.asked`.
        counts: what computing likelihoods took.
    """

    shots: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    answers: tuple[Answer, ...]
    counts: Counts

    @property
    def cut(self) -> int:
        """How many questions were longer than the context, and lost a part."""
        return sum(answer.prompt.cut for answer in self.answers)

    @property
    def fewer(self) -> int:
        """In how many prompts fewer solved examples fitted than were asked for."""
        return sum(answer.prompt.shots < self.shots for answer in self.answers)

    def as_dict(self) -> dict[str, Any]:
        """All but the answers, of JSON's types."""
        return {
            "shots": self.shots,
            "metrics": self.metrics,
            "intervals": {name: list(bounds) for name, bounds in self.intervals.items()},
            "examples": len(self.answers),
            "cut": self.cut,
            "fewer_shots": self.fewer,
            "counts": dataclasses.asdict(self.counts),
        }


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a task.

    Fields:
        asked: the examples.
        outcomes: one for each number of solved examples.
    """

    task: Task
    split: str
    config: TaskConfig
    asked: tuple[Asked, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None where there is nothing to guess from."""
        if self.task.kind not in ("choice", "cloze"):
            return None
        return _mean([1 / len(one.example.answers) for one in self.asked])

    @property
    def majority(self) -> float | None:
        """The accuracy of always giving the most frequent answer; None where each example has
        answers of its own."""
        if self.task.kind != "choice" or self.task.choices:
            return None
        ((_, most),) = Counter(one.example.right for one in self.asked).most_common(1)
        return most / len(self.asked)

    @property
    def unjoined(self) -> int:
        """How many lines of what was asked the detokeniser could not change."""
        return sum(one.example.unjoined for one in self.asked)

    def as_dict(self) -> dict[str, Any]:
        """All but the answers, of JSON's types."""
        return {
            "task": self.task.name,
            "split": self.split,
            "config": dataclasses.asdict(self.config),
            "chance": self.chance,
            "majority": self.majority,
            "unjoined_lines": self.unjoined,
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
        }


def evaluate(
    subject: Subject,
    task: Task,
    *,
    data: str | Path | None = None,
    config: TaskConfig | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Ask `subject` what `task` asks.

    data: the folder of the task's files; None means that of a user's own task file, or the task's
    own in the folder that the environment variable GPTKERNELS_DATA names.

    Raises FileNotFoundError and ValueError, in one sentence, for files, examples and settings that
    the task cannot be asked with, and ImportError where a metric's package is missing.
    """
    config = config or TaskConfig()
    check_settings(task, config, subject.run)
    how = normalisation(task, config)
    metrics.check_packages(task.metrics if task.kind == "generation" else ())
    intervals.check_packages()
    folder, split = task.data_folder(data), config.split or task.asked
    rows = read_rows(task, folder, split)
    asked = _asked(rows, config)
    source = _source(task) if max(config.counts) else split
    same = task.files[source] == task.files[split]
    prompter = Prompter(
        task,
        subject.tokenizer,
        subject.length,
        pool=rows if same else read_rows(task, folder, source),
        same=same,
        seed=config.seed,
        random_answers=config.random_answers,
    )
    prompter.check(asked, max(config.counts))
    outcomes = []
    for place, shots in enumerate(config.counts):

        def prompts(shots: int = shots, place: int = place) -> Iterator[Prompt]:
            for done, one in enumerate(asked):
                if observer is not None:
                    share = (place + done / len(asked)) / len(config.counts)
                    observer(f"{shots} shot{'' if shots == 1 else 's'}", share)
                yield prompter(one, shots)

        scorer = subject.scorer()
        if task.kind == "generation":
            answers = tuple(written(subject, task, config, prompts()))
        else:
            answers = tuple(chosen(subject, scorer, prompts(), how, task.unconditional))
        found = _judged(task, [one.example for one in asked], answers, config.seed)
        outcomes.append(Outcome(shots, *found, answers, scorer.counts))
    return Evaluation(task, split, config, asked, tuple(outcomes))


def _asked(rows: Sequence[ExampleRow], config: TaskConfig) -> tuple[Asked, ...]:
    """The examples that are asked."""
    places = list(range(len(rows)))
    if config.examples is not None and config.examples < len(rows):
        places = sorted(random.Random(config.seed).sample(places, config.examples))
    return tuple(Asked(place, rows[place].group, rows[place].example()) for place in places)


def _source(task: Task) -> str:
    """The part that examples in prompts are drawn from: the training part, or else the validation
    part."""
    source = "train" if "train" in task.files else "validation"
    if source not in task.files:
        raise ValueError(
            f"shots: task {task.name} has neither a train nor a validation part to draw examples "
            "from"
        )
    return source


def _judged(
    task: Task, examples: Sequence[Example], answers: Sequence[Answer], seed: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Metrics and their intervals."""
    if task.kind == "generation":
        predictions = [answer.text for answer in answers]
        references = [[one.strip() for one in example.answers] for example in examples]
        values = metrics.score(task.metrics, predictions, references)
        return values, {
            name: intervals.of_metric(name, predictions, references, seed) for name in task.metrics
        }
    if task.kind == "last-word":
        right = [float(answer.greedy) for answer in answers]
        likely = [answer.scores[0] for answer in answers]
        low, high = intervals.of_mean(likely, seed)
        return (
            {"accuracy": _mean(right), "perplexity": exponential(-_mean(likely))},
            {
                "accuracy": intervals.of_mean(right, seed),
                "perplexity": (exponential(-high), exponential(-low)),
            },
        )
    right = [
        float(answer.place == example.right)
        for example, answer in zip(examples, answers, strict=True)
    ]
    return {"accuracy": _mean(right)}, {"accuracy": intervals.of_mean(right, seed)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
