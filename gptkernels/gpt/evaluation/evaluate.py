"""A task, asked of a model: prompts, answers, and how good they are for each number of solved
examples in a prompt."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.gpt.evaluation import intervals, metrics
from gptkernels.gpt.evaluation.asking import Answer, chosen, normalisation, written
from gptkernels.gpt.evaluation.config import TaskConfig
from gptkernels.gpt.evaluation.examples import Example, read_examples
from gptkernels.gpt.evaluation.intervals import Interval
from gptkernels.gpt.evaluation.likelihood import Counts
from gptkernels.gpt.evaluation.prompts import Prompt, Prompter
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
        chance: the accuracy of guessing; None where there is nothing to guess from.
        answers: one for each example that was asked, in the order of `Evaluation.asked`.
        counts: what computing likelihoods took.
    """

    shots: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    chance: float | None
    answers: tuple[Answer, ...]
    counts: Counts

    @property
    def cut(self) -> int:
        """How many questions were longer than the context, and lost their beginnings."""
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
            "chance": self.chance,
            "examples": len(self.answers),
            "cut": self.cut,
            "fewer_shots": self.fewer,
            "counts": dataclasses.asdict(self.counts),
        }


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a task.

    Fields:
        asked: the examples, with their places in the task's part.
        outcomes: one for each number of solved examples.
    """

    task: Task
    split: str
    config: TaskConfig
    asked: tuple[tuple[int, Example], ...]
    outcomes: tuple[Outcome, ...]


def evaluate(
    subject: Subject,
    task: Task,
    *,
    data: str | Path | None = None,
    config: TaskConfig | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Ask `subject` what `task` asks.

    data: the folder of the task's files; None means the task's own in the folder that the
    environment variable GPTKERNELS_DATA names.

    Raises FileNotFoundError and ValueError, in one sentence, for files, examples and settings that
    the task cannot be asked with, and ImportError where a metric's package is missing.
    """
    config = config or TaskConfig()
    how = normalisation(task, config)
    metrics.check_packages(task.metrics if task.kind == "generation" else ())
    intervals.check_packages()
    folder, split = task.data_folder(data), config.split or task.asked
    examples = read_examples(task, folder, split)
    asked = _asked(examples, config)
    prompter = Prompter(
        task,
        subject.tokenizer,
        subject.length,
        pool=_pool(task, folder, split, examples) if max(config.counts) else (),
        seed=config.seed,
        random_answers=config.random_answers,
    )
    outcomes = []
    for place, shots in enumerate(config.counts):

        def prompts(shots: int = shots, place: int = place) -> Iterator[Prompt]:
            for done, (number, example) in enumerate(asked):
                if observer is not None:
                    share = (place + done / len(asked)) / len(config.counts)
                    observer(f"{shots} shot{'' if shots == 1 else 's'}", share)
                yield prompter(number, example, shots)

        scorer = subject.scorer()
        if task.kind == "generation":
            answers = tuple(written(subject, task, config, prompts()))
        else:
            answers = tuple(chosen(subject, scorer, prompts(), how, task.unconditional))
        found = _judged(task, [example for _, example in asked], answers, config.seed)
        outcomes.append(Outcome(shots, *found, answers, scorer.counts))
    return Evaluation(task, split, config, asked, tuple(outcomes))


def _asked(examples: Sequence[Example], config: TaskConfig) -> tuple[tuple[int, Example], ...]:
    """The examples that are asked, with their places, by which others are drawn for them."""
    places = list(range(len(examples)))
    if config.examples is not None and config.examples < len(examples):
        places = sorted(random.Random(config.seed).sample(places, config.examples))
    return tuple((place, examples[place]) for place in places)


def _pool(task: Task, folder: Path, split: str, examples: list[Example]) -> list[Example]:
    """What examples in prompts are drawn from: the training part, or else the validation part. What
    is asked is drawn from itself only where it is that part."""
    source = "train" if "train" in task.files else "validation"
    if source == split:
        return examples
    if source not in task.files:
        raise ValueError(
            f"shots: task {task.name} has neither a train nor a validation part to draw examples "
            "from"
        )
    return read_examples(task, folder, source)


def _judged(
    task: Task, examples: Sequence[Example], answers: Sequence[Answer], seed: int
) -> tuple[dict[str, float], dict[str, Interval], float | None]:
    """Metrics, their intervals, and the accuracy of guessing."""
    if task.kind == "generation":
        predictions = [answer.text for answer in answers]
        references = [[one.strip() for one in example.answers] for example in examples]
        values = metrics.score(task.metrics, predictions, references)
        bounds = {
            name: intervals.of_metric(name, predictions, references, seed) for name in task.metrics
        }
        return values, bounds, None
    if task.kind == "last-word":
        right = [float(answer.greedy) for answer in answers]
        likely = [answer.scores[0] for answer in answers]
        low, high = intervals.of_mean(likely, seed)
        values = {"accuracy": _mean(right), "perplexity": math.exp(-_mean(likely))}
        perplexities = (math.exp(-high), math.exp(-low))
        return (
            values,
            {"accuracy": intervals.of_mean(right, seed), "perplexity": perplexities},
            None,
        )
    right = [
        float(answer.place == example.right)
        for example, answer in zip(examples, answers, strict=True)
    ]
    chance = _mean([1 / len(example.answers) for example in examples])
    return {"accuracy": _mean(right)}, {"accuracy": intervals.of_mean(right, seed)}, chance


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
