"""Fine-tuning a model many times: what the analyses that do it share.

The model and the data of each task are read once. Each run is a record (records.py):

    task, variant, config                 what was done; the seed is one of the settings
    model, data                           digests of the weights and of the task's examples
    metric, part, score                   the task's first metric, on its test part, or else on its
                                          validation part
    validation, test, majority            all metrics, and those of always giving one answer
    examples                              how many there are in each part, and how many were cut
    seconds, cpu_seconds                  by the clock, and of all threads together
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class
from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.gpt.finetuning.analyses.records import (
    Record,
    Records,
    digest_of_examples,
    digest_of_model,
)
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.finetune import FinetuneResult, fitted, new_model
from gptkernels.gpt.finetuning.fitting import Observer
from gptkernels.gpt.finetuning.metrics import check_packages
from gptkernels.gpt.finetuning.parts import Parts, parts_for
from gptkernels.gpt.finetuning.task import Task, load_task
from gptkernels.gpt.loading import load
from gptkernels.gpt.model import GPT


@dataclass(frozen=True)
class Study:
    """What an analysis found, besides its files.

    Fields:
        records: of all runs that were asked for and are made, earlier ones among them.
        stopped: by SIGINT or SIGTERM, before the end; no figure was drawn then.
    """

    records: list[Record]
    stopped: bool


@dataclass(frozen=True)
class Planned:
    """A run to make: the task's name, what the figure calls the run, and how to fine-tune."""

    task: str
    variant: str
    config: FinetuneConfig


@dataclass(frozen=True)
class Subject:
    """A pre-trained model, and the examples of each task, encoded for it."""

    pretrained: GPT
    tasks: Mapping[str, tuple[Task, Parts]]


def read_subject(
    model: str | Path,
    tasks: Sequence[str | Path],
    data: str | Path | None,
    tokenizer: str | None,
) -> Subject:
    """What there is to fine-tune. Raises as `finetune` does, and ValueError for tasks that are
    none or have one name."""
    check_packages()
    figure_class()  # better to report a missing package now than after all runs
    described = load_tasks(tasks)
    folders = {name: home_of(task, data) for name, task in described.items()}
    pretrained, vocabulary = load(Path(model), tokenizer)
    return Subject(
        pretrained,
        {
            name: (task, parts_for(task, folders[name], vocabulary, pretrained.config))
            for name, task in described.items()
        },
    )


def load_tasks(tasks: Sequence[str | Path]) -> dict[str, Task]:
    """The tasks by their names. Raises as `load_task` does, and ValueError where there are none,
    or two of one name."""
    described = {task.name: task for task in map(load_task, tasks)}
    if not described or len(described) < len(tasks):
        raise ValueError(f"tasks must be one or more of different names, got {list(tasks)}")
    return described


def home_of(task: Task, data: str | Path | None) -> Path:
    """The folder of the task's files in `data`, the folder of all tasks; None: in the one that
    GPTKERNELS_DATA names. Raises as `Task.data_folder` does."""
    return task.data_folder(None if data is None else Path(data) / task.folder)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for no seeds at all, and for one that is named twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")


def carry_out(
    subject: Subject, plan: Sequence[Planned], file: Path, observer: Observer | None
) -> Study:
    """Make the runs of `plan` whose records are not in `file` yet, one after another.

    observer: called with the records of each run's log, which then name task, variant and seed, and
    with each finished run's record; and with the share of the plan that is done, 0 to 1.

    Raises ValueError for settings that do not fit the model or the data, before the first run,
    where another process works in the folder, and for a `file` that no analysis wrote; OSError
    where it cannot be written; DivergedError for a run whose loss is no longer finite.
    """
    check_folder("out", file.parent)
    parts = [subject.tasks[run.task][1].drawn(run.config) for run in plan]
    model = digest_of_model(subject.pretrained)
    data = {
        name: digest_of_examples(chain(of.training, of.validation, of.test))
        for name, (_, of) in subject.tasks.items()
    }
    study = Study([], stopped=False)
    with alone_in("out", file.parent):
        records = Records(file)
        for number, (run, drawn) in enumerate(zip(plan, parts, strict=True)):
            settings = {
                "task": run.task,
                "variant": run.variant,
                "config": dataclasses.asdict(run.config),
                "model": model,
                "data": data[run.task],
            }
            if (record := records.find(settings)) is None:
                watch = _within(run, number, len(plan), observer)
                measured = _run(subject, run, drawn, watch)
                if measured is None:
                    return dataclasses.replace(study, stopped=True)
                record = records.add(settings | measured)
                if observer is not None:
                    observer(record, (number + 1) / len(plan))
            study.records.append(record)
    return study


def _run(
    subject: Subject, run: Planned, parts: Parts, observer: Observer | None
) -> dict[str, Any] | None:
    """What one run measures; None where a signal stopped it."""
    task, _ = subject.tasks[run.task]
    started = time.process_time()
    network = new_model(task, subject.pretrained, parts, run.config)
    result = fitted(network, parts, run.config, observer)
    if result.stopped:
        return None
    return _measured(task, parts, result) | {"cpu_seconds": time.process_time() - started}


def _measured(task: Task, parts: Parts, result: FinetuneResult) -> dict[str, Any]:
    metric = task.metrics[0]
    return {
        "metric": metric,
        "part": "test" if parts.test else "validation",
        "score": (result.test or result.validation)[metric],
        "validation": result.validation,
        "test": result.test,
        "majority": result.majority,
        "examples": {
            "training": len(parts.training),
            "validation": len(parts.validation),
            "test": len(parts.test),
            "truncated": result.truncated,
        },
        "seconds": result.seconds,
    }


def _within(run: Planned, number: int, runs: int, observer: Observer | None) -> Observer | None:
    """An observer of run `number`, for the one of the whole plan."""
    if observer is None:
        return None
    named = {"task": run.task, "variant": run.variant, "seed": run.config.seed}
    return lambda record, done: observer(named | record, (number + done) / runs)
