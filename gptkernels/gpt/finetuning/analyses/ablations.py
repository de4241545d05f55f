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

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkernels.gpt.finetuning.analyses.plots import draw_bars
from gptkernels.gpt.finetuning.analyses.records import Record
from gptkernels.gpt.finetuning.analyses.spread import Table, metrics_of, summarise
from gptkernels.gpt.finetuning.analyses.study import Study, carry_out
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.training.observer import Observer

FULL, SCRATCH = "full", "without pre-training"
_CHANGES: dict[str, dict[str, Any]] = {
    FULL: {},
    "without the auxiliary loss": {"lm_coefficient": 0.0},
    SCRATCH: {"transfer": "none"},
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

    Raises ValueError where a configuration leaves out already what an ablation leaves out. The
    arguments, what is not made again, and the other errors are those of `carry_out`.
    """
    out = Path(out)
    for name, config in tasks.items():
        _check_complete(name, config)
    study = carry_out(
        model,
        out / "ablations.json",
        lambda shape: _CHANGES,
        tasks=tasks,
        seeds=seeds,
        data=data,
        tokenizer=tokenizer,
        observer=observer,
    )
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
