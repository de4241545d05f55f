"""What each block that is transferred adds: figure 2 (left) of GPT-1's paper.

The model is fine-tuned with nothing of it (none), with its embeddings alone (0), with its first
block too (1), and so on to all blocks. What is not transferred begins at random.

    out/   layers.json   the record of each run (study.py)
           layers.png    a line for each task, means and deviations over the seeds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.finetuning.analyses.plots import draw_layers
from gptkernels.gpt.finetuning.analyses.spread import metrics_of, summarise
from gptkernels.gpt.finetuning.analyses.study import Study, carry_out
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.training.observer import Observer


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

    `seeds` and the number of blocks take the place of seed and transfer in `tasks`. The arguments,
    what is not made again, and the errors are those of `carry_out`.
    """
    out = Path(out)
    study = carry_out(
        model,
        out / "layers.json",
        _transfers,
        tasks=tasks,
        seeds=seeds,
        data=data,
        tokenizer=tokenizer,
        observer=observer,
    )
    if not study.stopped:
        draw_layers(summarise(study.records), metrics_of(study.records), out / "layers.png")
    return study


def _transfers(shape: GPTConfig) -> dict[str, dict[str, str]]:
    names = ("none", *map(str, range(shape.n_layer + 1)))
    return {name: {"transfer": name} for name in names}
