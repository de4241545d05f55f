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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.core.figure import figure_class
from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.finetuning.analyses.records import (
    Record,
    Records,
    digest_of_examples,
    digest_of_model,
)
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.finetune import FinetuneResult, fitted, new_model
from gptkernels.gpt.finetuning.metrics import check_packages
from gptkernels.gpt.finetuning.parts import Parts, parts_for
from gptkernels.gpt.finetuning.task import Task, as_dict, load_task
from gptkernels.gpt.loading import load
from gptkernels.gpt.model import GPT
from gptkernels.gpt.training.observer import Observer, watching

Variants = Callable[[GPTConfig], Mapping[str, Mapping[str, Any]]]
"""From the shape of the model: the name of each variant, and the settings that make it."""


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
class _Subject:
    """A pre-trained model, and the examples of each task, encoded for it."""

    pretrained: GPT
    tasks: Mapping[str, tuple[Task, Parts]]


@dataclass(frozen=True)
class _Run:
    """A run to make: the task's name, what the figure calls the run, and how to fine-tune."""

    task: str
    variant: str
    config: FinetuneConfig


def carry_out(
    model: str | Path,
    file: Path,
    variants: Variants,
    *,
    tasks: Mapping[str, FinetuneConfig],
    seeds: Sequence[int],
    data: str | Path | None,
    tokenizer: str | None,
    observer: Observer | None,
) -> Study:
    """Fine-tune `model` on each task, by each variant, with each seed, and keep the records in
    `file`. A run whose record is there already, of the same settings, weights and examples, is not
    made again: what was interrupted goes on.

    model, tokenizer: as of `finetune`. variants: see there. tasks: how to fine-tune on each, by the
    task's name or the path of its .toml file; a seed takes the place of the seed there. All
    variants of a task and a seed come before the next task, all tasks of a seed before the next
    seed. data: the folder that holds the tasks' folders; None: the one that GPTKERNELS_DATA names.
    observer: called with the records of each run's log, which then name task, variant and seed, and
    with each finished run's record; and with the share of all runs that is done, 0 to 1.

    Raises as `finetune` does; ValueError, too, for tasks that are none or have one name, such
    seeds, and a `file` that no analysis wrote.
    """
    check_folder("out", file.parent)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")
    subject = _read_subject(model, list(tasks), data, tokenizer)
    changes = variants(subject.pretrained.config)
    runs = [
        _Run(task, variant, dataclasses.replace(config, seed=seed, **change))
        for seed in seeds
        for task, config in zip(subject.tasks, tasks.values(), strict=True)
        for variant, change in changes.items()
    ]
    return _carry_out(subject, runs, file, observer)


def _read_subject(
    model: str | Path, tasks: Sequence[str], data: str | Path | None, tokenizer: str | None
) -> _Subject:
    check_packages()
    figure_class()  # better to report a missing package now than after all runs
    described = load_tasks(tasks)
    folders = {name: home_of(task, data) for name, task in described.items()}
    pretrained, vocabulary = load(Path(model), tokenizer)
    return _Subject(
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


def asks(task: Task) -> dict[str, Any]:
    """What `task` is, but for where its files are."""
    content = as_dict(task)
    return {key: value for key, value in content.items() if key not in ("files", "folder")}


def home_of(task: Task, data: str | Path | None) -> Path:
    """The folder of the task's files in `data`, the folder of all tasks; None: in the one that
    GPTKERNELS_DATA names. Raises as `Task.data_folder` does."""
    return task.data_folder(None if data is None else Path(data) / task.folder)


def _carry_out(
    subject: _Subject, runs: Sequence[_Run], file: Path, observer: Observer | None
) -> Study:
    # All, before the first run: better to report a setting that does not fit now.
    parts = [subject.tasks[run.task][1].drawn(run.config) for run in runs]
    model = digest_of_model(subject.pretrained)
    data = {
        name: "/".join(map(digest_of_examples, (of.training, of.validation, of.test)))
        for name, (_, of) in subject.tasks.items()
    }
    study = Study([], stopped=False)
    with alone_in("out", file.parent):
        records = Records(file)
        for number, (run, drawn) in enumerate(zip(runs, parts, strict=True)):
            settings = {
                "task": run.task,
                "variant": run.variant,
                "config": dataclasses.asdict(run.config),
                "model": model,
                "data": data[run.task],
                "asks": asks(subject.tasks[run.task][0]),
            }
            if (record := records.find(settings)) is None:
                watch = _within(run, number, len(runs), observer)
                heard = watching(observer).stopping
                measured, asked_to_stop = _run(subject, run, drawn, watch, heard)
                if measured is not None:
                    record = records.add(settings | measured)
                    if observer is not None:
                        observer(record, (number + 1) / len(runs))
                    study.records.append(record)
                if asked_to_stop:
                    return dataclasses.replace(
                        study, stopped=measured is None or number + 1 < len(runs)
                    )
            else:
                study.records.append(record)
    return study


def _run(
    subject: _Subject,
    run: _Run,
    parts: Parts,
    observer: Observer | None,
    on_signal: Callable[[], None],
) -> tuple[dict[str, Any] | None, bool]:
    """What one run measures, None where a signal stopped it; and whether one asked to stop."""
    task, _ = subject.tasks[run.task]
    started = time.process_time()
    network = new_model(task, subject.pretrained, parts, run.config)
    result = fitted(network, parts, run.config, observer, on_signal=on_signal)
    if result.stopped:
        return None, True
    measured = _measured(task, parts, result) | {"cpu_seconds": time.process_time() - started}
    return measured, result.asked_to_stop


def _measured(task: Task, parts: Parts, result: FinetuneResult) -> dict[str, Any]:
    metric = task.metrics[0]
    return {
        "metric": metric,
        "part": "test" if result.test else "validation",
        "score": (result.test or result.validation)[metric],
        "validation": result.validation,
        "test": result.test,
        "majority": result.majority,
        "examples": parts.counts(),
        "seconds": result.seconds,
    }


def _within(run: _Run, number: int, runs: int, observer: Observer | None) -> Observer | None:
    """An observer of run `number`, for the one of them all."""
    if observer is None:
        return None
    named = {"task": run.task, "variant": run.variant, "seed": run.config.seed}
    return lambda record, done: observer(named | record, (number + done) / runs)
