"""Fine-tuning: a pre-trained GPT and a task in, a folder with a model that answers out.

    out/   log.jsonl         a JSON object a line: the losses; after each epoch the metrics
           model/            the best epoch's model (folder.py), replaced whenever there is a better
           predictions.tsv   its answers to the test part, or else to the validation part; not where
                             a signal stopped the run
           results.json      its metrics beside those of the majority's, the settings, the counts

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptkernels.core.device import choose_device
from gptkernels.core.files import check_folder, replacing
from gptkernels.core.lock import alone_in
from gptkernels.gpt.finetuning import folder
from gptkernels.gpt.finetuning.answers import Answer, answer, judge
from gptkernels.gpt.finetuning.batches import Encoded
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.fitting import Fit
from gptkernels.gpt.finetuning.metrics import check_packages
from gptkernels.gpt.finetuning.parts import Parts, baseline, parts_for, targets
from gptkernels.gpt.finetuning.task import Task, load_task
from gptkernels.gpt.finetuning.task_model import TaskModel, standardisation, transferred
from gptkernels.gpt.loading import load
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import DTYPES
from gptkernels.gpt.training.log import Log
from gptkernels.gpt.training.observer import Observer, watching


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves behind, besides its folder.

    Fields:
        model: the best epoch's, in evaluation mode.
        validation, test: its metrics; `test` is empty where the task has no test part, or one
            without answers, both where no epoch ended before the run was stopped.
        majority: of always giving the training part's most frequent answer, or its mean, on the
            test part, or else the validation part.
        answers: to the test part, or else the validation part; none where the run was stopped.
        truncated: how many examples were too long for the model, and were cut.
        stopped: by SIGINT or SIGTERM, before the end.
        asked_to_stop: by one of them, if only after the last step.
    """

    model: TaskModel
    validation: dict[str, float]
    test: dict[str, float]
    majority: dict[str, float]
    answers: list[Answer]
    truncated: int
    seconds: float
    stopped: bool
    asked_to_stop: bool


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    task: str | Path | Task,
    data: str | Path | None = None,
    tokenizer: str | None = None,
    config: FinetuneConfig | None = None,
    observer: Observer | None = None,
) -> FinetuneResult:
    """Fine-tune `model` on `task` and write the folder `out`.

    model: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train` wrote, its
    checkpoint.pt, or a nanoGPT checkpoint. task: a name (sst-2, sick-entailment, sick-relatedness,
    mctest) or the path of a .toml file (task.py). data: the folder of the task's files. tokenizer:
    where nothing beside the model says which it is.

    Raises FileNotFoundError or ValueError for a model, a task or data that cannot be used, and when
    `out` already holds a run, before anything is written; ImportError where scikit-learn, scipy or
    a tokenizer's package is missing; DivergedError when the loss is no longer finite (the best
    model so far stays); RuntimeError when `config.impl` cannot run on the device; OSError when
    `out` is a file or cannot be written.
    """
    config, out = config or FinetuneConfig(), Path(out)
    check_packages()
    _check_new(out)
    task = task if isinstance(task, Task) else load_task(task)
    data_folder = task.data_folder(data)
    pretrained, vocabulary = load(Path(model), tokenizer)
    parts = parts_for(task, data_folder, vocabulary, pretrained.config).drawn(config)
    network = new_model(task, pretrained, parts, config)
    with alone_in("out", out):
        _check_new(out)
        log = Log(out)

        def observe(record: dict[str, Any], done: float) -> None:
            log.write(record)
            if observer is not None:
                observer(record, done)

        def keep() -> None:
            folder.save(network, vocabulary, out / "model")

        result = fitted(network, parts, config, observe, keep, watching(observer).stopping)
        if not result.stopped:
            write_predictions(out / "predictions.tsv", task, parts.asked, result.answers)
        _write_results(out / "results.json", model, task, parts, config, result)
    return result


def new_model(task: Task, pretrained: GPT, parts: Parts, config: FinetuneConfig) -> TaskModel:
    """What fine-tuning begins with, on its device. Its random numbers follow from the seed."""
    torch.manual_seed(config.seed)
    body = transferred(pretrained, config.transfer, config.dropout)
    scale = (0.0, 1.0) if task.range is None else standardisation(targets(parts.training))
    network = TaskModel(task, body, config.head_dropout, scale)
    network.body.set_impl(config.impl)
    return network.to(choose_device(config.device))


def fitted(
    network: TaskModel,
    parts: Parts,
    config: FinetuneConfig,
    observer: Observer | None = None,
    on_best: Callable[[], None] | None = None,
    on_signal: Callable[[], None] | None = None,
) -> FinetuneResult:
    """Fine-tune `network`, which `new_model` made, in place, and judge it. Writes no file.

    parts: as `Parts.drawn` returns them. observer, on_best, on_signal, and the error: as of Fit
    (fitting.py). A model whose run was stopped answers nothing, which may take long.
    """
    started = time.perf_counter()
    fit = Fit(network, parts.training, parts.validation, config, observer, on_best, on_signal)
    stopped = fit.run()
    answers: list[Answer] = []
    if not stopped:
        answers = answer(network, parts.asked, config.batch_size, DTYPES[config.dtype])
    labelled = answers and parts.test and parts.judged is parts.test
    return FinetuneResult(
        network,
        fit.best,
        judge(network.task, parts.test, answers) if labelled else {},
        baseline(network.task, parts),
        answers,
        parts.truncated,
        time.perf_counter() - started,
        stopped,
        fit.asked_to_stop,
    )


def write_predictions(
    path: Path, task: Task, examples: Sequence[Encoded], answers: Sequence[Answer]
) -> None:
    """Write a line for each example: its number, the answer, the right answer where it is known,
    and the probability of each class or choice."""
    with replacing(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        longest = max(len(one.probabilities) for one in answers)
        names = task.classes or tuple(map(str, range(longest)))
        writer.writerow(["example", "prediction", "target", *names[:longest]])
        for i, (one, example) in enumerate(zip(answers, examples, strict=True)):
            right = "" if example.target is None else _exact(task, example.target)
            chances = [f"{p:.6f}" for p in one.probabilities]
            blank = [""] * (longest - len(chances))  # of examples with fewer choices than others
            writer.writerow([i, _exact(task, one.value), right, *chances, *blank])


def _exact(task: Task, value: float) -> str:
    """A class's name; a choice's or a number's value, with all digits that fp32 has."""
    return task.classes[int(value)] if task.classes else f"{value:.9g}"


def _write_results(
    path: Path,
    model: str | Path,
    task: Task,
    parts: Parts,
    config: FinetuneConfig,
    result: FinetuneResult,
) -> None:
    content = {
        "task": task.name,
        "model": str(model),
        "config": dataclasses.asdict(config),
        "examples": parts.counts(),
        "validation": result.validation,
        "test": result.test,
        "majority": result.majority,
        "seconds": result.seconds,
        "stopped": result.stopped,
    }
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_new(out: Path) -> None:
    check_folder("out", out)
    for name in ("results.json", "model", "checkpoint.pt"):
        if (out / name).exists():
            raise ValueError(f"out: {out} already holds a run ({name}), name another folder")
