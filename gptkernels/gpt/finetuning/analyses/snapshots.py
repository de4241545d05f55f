"""What pre-training teaches without fine-tuning: figure 2 (right) of GPT-1's paper.

The models that a training run kept along the way (`train` with snapshot_interval) answer tasks as
language models (zero_shot.py). The paper's axis goes from a random guess, 0, to the state of the
art of its day, 1. Here 1 is an accuracy of 1, which does not age:

    share = (accuracy - chance) / (1 - chance),   chance the mean of 1 / answers to choose from

    out/   zero_shot.json   a record for each model and task: step, task, examples, how many were
                            cut, chance, all metrics as they are, and share
           zero_shot.png    share over the steps, a line for each task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptkernels.core.device import choose_device
from gptkernels.core.figure import figure_class
from gptkernels.core.files import check_folder
from gptkernels.core.lock import alone_in
from gptkernels.gpt.finetuning.analyses.plots import draw_steps
from gptkernels.gpt.finetuning.analyses.records import (
    Record,
    Records,
    digest_of_examples,
    digest_of_model,
)
from gptkernels.gpt.finetuning.analyses.study import asks, home_of, load_tasks
from gptkernels.gpt.finetuning.metrics import check_packages, score
from gptkernels.gpt.finetuning.parts import targets
from gptkernels.gpt.finetuning.reading import Example, read_split
from gptkernels.gpt.finetuning.task import SPLITS, Task
from gptkernels.gpt.finetuning.zero_shot import Question, guesses, heuristic, questions
from gptkernels.gpt.loading import load
from gptkernels.gpt.model import GPT
from gptkernels.gpt.options import DEVICE, IMPL, check_option, check_options, one_of, option
from gptkernels.gpt.precision import DTYPES
from gptkernels.gpt.training.observer import Observer


@dataclass(frozen=True)
class ZeroShotConfig:
    """How to ask. Raises ValueError for a value out of range, TypeError for a wrong type."""

    examples: int | None = option(
        None, "Examples that are asked at most, the first ones.", least=1, unset="all"
    )
    batch_size: int = option(32, "Examples that the model reads at once.", least=1)
    dtype: str = option(
        "float32", "Dtype of the computation: float32, or bfloat16 or float16 under autocast."
    )
    device: str = option("auto", DEVICE)
    impl: str = option("auto", IMPL)

    def __post_init__(self) -> None:
        check_options(self)
        check_option(self, "dtype", self.dtype in DTYPES, one_of(DTYPES))


def zero_shot(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    tasks: Sequence[str],
    data: str | Path | None = None,
    tokenizer: str | None = None,
    config: ZeroShotConfig | None = None,
    observer: Observer | None = None,
) -> list[Record]:
    """Ask models of different steps about each task, and write into the folder `out`; returns the
    records, step by step.

    models: the folder of a training run with snapshots/, or the folders of models, each named by
    its step. tasks: names, or paths of .toml files. data: the folder that holds the tasks' folders;
    None: the one that GPTKERNELS_DATA names. tokenizer: where no model says which it is. observer:
    called with each new record, and the share that is done, 0 to 1. A record that is there already,
    of the same weights and examples, is not made again.

    The examples are those of the task's test part, or else of its validation or its training part:
    nothing is trained.

    Raises FileNotFoundError or ValueError for models, tasks or data that cannot be used, a task
    that has no [zero_shot] among them, and where another process works in `out`; ImportError for
    a missing package; OSError where `out` is a file or cannot be written.
    """
    config, out = config or ZeroShotConfig(), Path(out)
    check_packages()
    figure_class()  # better to report a missing package now than at the end
    check_folder("out", out)
    described = load_tasks(tasks)
    for task in described.values():
        heuristic(task)
    steps = snapshots([Path(model) for model in models])
    examples = {name: _read(task, data, config.examples) for name, task in described.items()}
    found: list[Record] = []
    with alone_in("out", out):
        records = Records(out / "zero_shot.json")
        for step, folder in steps.items():
            model, vocabulary = load(folder, tokenizer)
            digest = digest_of_model(model)
            model.set_impl(config.impl).to(choose_device(config.device))
            for name, task in described.items():
                asked = questions(task, examples[name], vocabulary, model.config.block_size)
                settings = {
                    "task": name,
                    "step": step,
                    "model": digest,
                    "data": digest_of_examples(asked),
                    "asks": asks(task),
                    "dtype": config.dtype,
                }
                if (record := records.find(settings)) is None:
                    record = records.add(settings | _measured(model, task, asked, config))
                    if observer is not None:
                        observer(record, (len(found) + 1) / (len(steps) * len(described)))
                found.append(record)
    lines = {
        name: [(record["step"], record["share"]) for record in found if record["task"] == name]
        for name in described
    }
    draw_steps(lines, out / "zero_shot.png")
    return found


def snapshots(models: Sequence[Path]) -> Mapping[int, Path]:
    """step -> folder, in the order of steps. Raises FileNotFoundError for a path that is not there,
    and ValueError where no step is known."""
    for path in models:
        if not path.is_dir():
            raise FileNotFoundError(f"models: {path} is not a folder")
    folders = list(models)
    if len(models) == 1 and (kept := models[0] / "snapshots").is_dir():
        folders = [path for path in kept.iterdir() if _step(path) is not None]
    steps: dict[int, Path] = {}
    for path in folders:
        if (step := _step(path)) is None or step in steps:
            raise ValueError(
                f"models: {path} has no snapshots/ and no step of its own as its name; train with "
                "--snapshot-interval to keep models along the way"
            )
        steps[step] = path
    if not steps:
        raise ValueError(
            "models: there are no snapshots; train with --snapshot-interval to keep models along "
            "the way"
        )
    return dict(sorted(steps.items()))


def _step(path: Path) -> int | None:
    name = path.resolve().name
    return int(name) if name.isascii() and name.isdigit() else None


def _read(task: Task, data: str | Path | None, count: int | None) -> list[Example]:
    split = next(split for split in reversed(SPLITS) if split in task.files)
    return read_split(task, home_of(task, data), split)[:count]


def _measured(
    model: GPT, task: Task, asked: Sequence[Question], config: ZeroShotConfig
) -> dict[str, Any]:
    guessed = guesses(model, task, asked, config.batch_size, DTYPES[config.dtype])
    names = tuple(dict.fromkeys(("accuracy", *task.metrics)))
    metrics = score(names, targets(asked), guessed, len(task.classes))
    chance = sum(1 / len(one.rows) for one in asked) / len(asked)
    return {
        "examples": len(asked),
        "truncated": sum(one.cut for one in asked),
        "chance": chance,
        "metrics": metrics,
        "share": (metrics["accuracy"] - chance) / (1 - chance),
    }
