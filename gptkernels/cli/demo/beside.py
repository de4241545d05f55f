"""The demo's training once more, in plain PyTorch: for a share of the steps, from the same initial
weights, on the same batches, at the same learning rates.

Only rounding separates the two, and training amplifies it; with dropout each model draws masks of
its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console

from gptkernels.bench.report.words import count
from gptkernels.cli.console import print_text
from gptkernels.cli.demo.terminal import Row, heading
from gptkernels.cli.demo.training import Training
from gptkernels.gpt.training.plain import Curve, differences, initial_weights, train_plainly
from gptkernels.truth.plain_gpt import PlainGPT

SHARE = 1 / 6  # of the steps; it takes about as much of the minutes


@dataclass(frozen=True)
class Beside:
    """The plain model's curve and how far ours is from it, in nats: at most, at which step, of all
    `compared` records that both have. `seconds` and `ours_s` are what these steps took."""

    curve: Curve
    steps: int
    compared: int
    largest: float
    at_step: int
    seconds: float
    ours_s: float
    dropout: bool

    @property
    def sentence(self) -> str:
        """What was seen."""
        shared = (
            f"The first {count(self.steps, 'step')} are shared with plain PyTorch: the same "
            "initial weights, batches and learning rates."
        )
        records = count(self.compared, "record")
        if not self.largest:
            apart = f"The training losses are equal to the last bit ({records})."
        else:
            why = (
                "each model draws dropout masks of its own"
                if self.dropout
                else "only rounding separates them, and training amplifies it"
            )
            apart = (
                f"The training losses are at most {self.largest:.2g} nats apart (at step "
                f"{self.at_step:,}, of {records}): {why}."
            )
        took = f"PyTorch took {self.seconds:.1f} s for them, gptkernels {self.ours_s:.1f} s."
        return f"{shared} {apart} {took}"

    def as_dict(self) -> Row:
        """For JSON."""
        return {
            "steps": self.steps,
            "records": self.curve,
            "largest_difference": self.largest,
            "at_step": self.at_step,
            "seconds": self.seconds,
            "gptkernels_seconds": self.ours_s,
        }


def train_beside(trained: Training, console: Console) -> Beside:
    """Train the plain model, and compare the two curves."""
    heading(
        console,
        "3. The same training in plain PyTorch",
        "A share of the steps, from the same weights, on the same batches.",
    )
    task, config = trained.task, trained.task.config
    steps = _steps(len(trained.rates), config.log_interval)
    plain = PlainGPT(task.model)
    plain.load_state_dict(initial_weights(task.model, config.seed))
    plain.to(task.device)
    with console.status(f"training {steps:,} steps"):
        curve = train_plainly(
            plain, *task.parts, task.model.block_size, config, rates=trained.rates[:steps]
        )
    gaps = differences(trained.records, curve)["loss"]
    at_step, largest = max(gaps, key=lambda pair: pair[1])
    ours_s = next(r["seconds"] for r in trained.records if r["step"] >= steps)
    seconds = curve[-1]["seconds"]  # as those of ours, without the last validation
    dropout = task.model.dropout > 0
    found = Beside(curve, steps, len(gaps), largest, at_step, seconds, ours_s, dropout)
    print_text(console, found.sentence)
    return found


def _steps(made: int, interval: int) -> int:
    """The share of the steps that were made, up to a record of both."""
    return min(made, math.ceil(SHARE * made / interval) * interval)
