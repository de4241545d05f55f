"""The demo's first part: what is the fastest on this machine, for the calls of its model."""

from __future__ import annotations

import torch
from rich.console import Console

from gptkernels.bench.text import seconds
from gptkernels.cli.console import print_text
from gptkernels.cli.demo import training
from gptkernels.cli.demo.terminal import Row, heading
from gptkernels.cli.table import Column, print_table
from gptkernels.cli.tune_table import classes, row
from gptkernels.core import tuned_files
from gptkernels.core.choice import switched_off
from gptkernels.tuning import explanation, tune
from gptkernels.tuning.models import classes_of

SECONDS = 20.0
_COLUMNS = (
    Column("op"),
    Column("direction", lost=2),
    Column("up to", lost=3),
    Column("fastest"),
    Column("time", right=True),
    Column("PyTorch's", right=True, lost=1),
)


def tune_model(device: torch.device, console: Console) -> list[Row]:
    """Measures the calls of the demo's training step, and says what won; nothing where a variable
    of the environment says that no table is used."""
    heading(
        console,
        "1. Tuning",
        'Which implementation is the fastest here for the model\'s calls; impl="auto" takes it.',
    )
    if switched_off() or not tuned_files.switched_on():
        print_text(
            console, "Switched off by GPTKERNELS_TUNE or GPTKERNELS_IMPL: nothing is measured."
        )
        return []
    on_gpu = device.type == "cuda"
    config, batch = training.size(on_gpu)
    with console.status("measuring"):
        wanted = classes_of(
            config,
            torch.bfloat16 if on_gpu else torch.float32,
            device,
            batch=batch,
            tokens=config.block_size,
            train=True,
            autocast=on_gpu,
        )
        report = tune(wanted, seconds=SECONDS)
    rows = [row(found) for entry in report.entries for found in explanation.of_entry(entry)]
    print_table(
        console,
        _COLUMNS,
        [
            (
                found["class"]["op"],
                found["class"]["direction"],
                explanation.said(found["sizes"]),
                found["way"],
                seconds(found["time_s"]),
                seconds(found["pytorch_s"]),
            )
            for found in rows
        ],
    )
    if report.left:
        left = classes(len(report.left))
        print_text(console, f"No time was left for {left} of calls: a fixed rule chooses for them.")
    return rows
