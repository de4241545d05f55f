"""Mean and deviation of the runs that differ in their seed alone, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from gptkernels.gpt.finetuning.analyses.records import Record


@dataclass(frozen=True)
class Spread:
    """Of some scores: the mean, and the sample's standard deviation (n - 1), 0 for one score."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}"


Table = dict[str, dict[str, Spread]]
"""variant -> task -> Spread, in the order of the records."""


def summarise(records: Iterable[Record]) -> Table:
    """The spread over the seeds, of each variant and task."""
    scores: dict[str, dict[str, list[float]]] = {}
    for record in records:
        scores.setdefault(record["variant"], {}).setdefault(record["task"], []).append(
            record["score"]
        )
    return {
        variant: {task: _spread(found) for task, found in of_tasks.items()}
        for variant, of_tasks in scores.items()
    }


def metrics_of(records: Iterable[Record]) -> dict[str, str]:
    """task -> what its scores are, such as "sst-2 accuracy (test)"."""
    return {r["task"]: f"{r['task']} {r['metric']} ({r['part']})" for r in records}


def markdown(table: Table, metrics: dict[str, str]) -> str:
    """`table` as one of Markdown: a row for each variant, a column for each task."""
    lines = [f"| | {' | '.join(metrics.values())} |", f"| --- |{' ---: |' * len(metrics)}"]
    for variant, of_tasks in table.items():
        cells = [str(of_tasks[task]) for task in metrics]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(scores: list[float]) -> Spread:
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return Spread(statistics.fmean(scores), deviation)
