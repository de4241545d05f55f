"""What the auxiliary loss and pre-training add: table 5 of GPT-1's paper.

    full                         as configured
    without the auxiliary loss   lm_coefficient = 0
    without pre-training         transfer = "none": all weights begin at random
    majority                     always the training part's most frequent answer, or its mean

One thing is taken away at a time: without pre-training, too, the auxiliary loss stays. The paper's
fourth model, an LSTM, is not among these.

    out/   ablations.json   the record of each run (study.py)
           ablations.png    a group of bars for each task, means and deviations over the seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkernels.gpt.finetuning.analyses.plots import draw_bars
from gptkernels.gpt.finetuning.analyses.records import Record
from gptkernels.gpt.finetuning.analyses.spread import Table, metrics_of, summarise
from gptkernels.gpt.finetuning.analyses.study import (
    Planned,
    Study,
    carry_out,
    check_seeds,
    read_subject,
)
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.fitting import Observer

FULL = "full"
_CHANGES: dict[str, dict[str, Any]] = {
    FULL: {},
    "without the auxiliary loss": {"lm_coefficient": 0.0},
    "without pre-training": {"transfer": "none"},
}


def ablations(
    model: str | Path,
    out: str | Path,
    *,
    tasks: Mapping[str, FinetuneConfig],
    seeds: Sequence[int],
    data: str | Path | None = None,
    tokenizer: str | None = None,
    observer: Observer | None = None,
) -> Study:
    """Fine-tune `model` in full and with one thing taken away, and write into the folder `out`.

    A run whose record is there already, of the same settings, weights and examples, is not made
    again: an interrupted analysis goes on. All variants of a task and a seed are made before those
    of the next, all tasks of a seed before the next seed.

    model, tokenizer: as of `finetune`. tasks: how to fine-tune on each, by the task's name or the
    path of its .toml file; seeds take the place of the seed there. data: the folder that holds the
    tasks' folders. observer: as of `carry_out`.

    Raises ValueError where a configuration leaves out already what an ablation leaves out; else as
    `read_subject` and `carry_out` do.
    """
    out = Path(out)
    check_seeds(seeds)
    for name, config in tasks.items():
        _check_complete(name, config)
    subject = read_subject(model, list(tasks), data, tokenizer)
    configs = dict(zip(subject.tasks, tasks.values(), strict=True))
    plan = [
        Planned(task, variant, dataclasses.replace(config, seed=seed, **changes))
        for seed in seeds
        for task, config in configs.items()
        for variant, changes in _CHANGES.items()
    ]
    study = carry_out(subject, plan, out / "ablations.json", observer)
    if not study.stopped:
        draw_bars(summary(study.records), metrics_of(study.records), out / "ablations.png")
    return study


def summary(records: Iterable[Record]) -> Table:
    """The spread of each variant, and of the majority's answers, over the seeds."""
    found = list(records)
    always = [
        record | {"variant": "majority", "score": record["majority"][record["metric"]]}
        for record in found
        if record["variant"] == FULL
    ]
    return summarise([*found, *always])


def _check_complete(name: str, config: FinetuneConfig) -> None:
    if not config.lm_coefficient:
        raise ValueError(f"lm_coefficient is 0 for {name}: nothing is left to be taken away")
    if config.transfer == "none":
        raise ValueError(f"transfer is none for {name}: nothing is left to be taken away")
