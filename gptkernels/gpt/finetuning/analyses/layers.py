"""What each block that is transferred adds: figure 2 (left) of GPT-1's paper.

The model is fine-tuned with nothing of it (none), with its embeddings alone (0), with its first
block too (1), and so on to all blocks. What is not transferred begins at random.

    out/   layers.json   the record of each run (study.py)
           layers.png    a line for each task, means and deviations over the seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptkernels.gpt.finetuning.analyses.plots import draw_layers
from gptkernels.gpt.finetuning.analyses.spread import metrics_of, summarise
from gptkernels.gpt.finetuning.analyses.study import (
    Planned,
    Study,
    carry_out,
    check_seeds,
    read_subject,
)
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.fitting import Observer


def layers(
    model: str | Path,
    out: str | Path,
    *,
    tasks: Mapping[str, FinetuneConfig],
    seeds: Sequence[int],
    data: str | Path | None = None,
    tokenizer: str | None = None,
    observer: Observer | None = None,
) -> Study:
    """Fine-tune `model` with more and more of its blocks, and write into the folder `out`.

    tasks: how to fine-tune on each; `seeds` and the number of blocks take the place of seed and
    transfer there. The other arguments, what is not made again, and the errors are those of
    `ablations`.
    """
    out = Path(out)
    check_seeds(seeds)
    subject = read_subject(model, list(tasks), data, tokenizer)
    configs = dict(zip(subject.tasks, tasks.values(), strict=True))
    transfers = ("none", *map(str, range(subject.pretrained.config.n_layer + 1)))
    plan = [
        Planned(task, transfer, dataclasses.replace(config, seed=seed, transfer=transfer))
        for seed in seeds
        for task, config in configs.items()
        for transfer in transfers
    ]
    study = carry_out(subject, plan, out / "layers.json", observer)
    if not study.stopped:
        draw_layers(summarise(study.records), metrics_of(study.records), out / "layers.png")
    return study
