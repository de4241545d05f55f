"""The demo's first part: what is the fastest on this machine, for the calls of its model."""

from __future__ import annotations

import torch
from rich.console import Console

from gptkernels.bench.text import seconds
from gptkernels.cli.demo import training
from gptkernels.cli.demo.terminal import Row, heading, table
from gptkernels.cli.tune_table import row
from gptkernels.core import tuned_files
from gptkernels.core.choice import switched_off
from gptkernels.tuning import explanation, tune
from gptkernels.tuning.models import classes_of

_SECONDS = 20.0


def tune_model(device: torch.device, console: Console) -> list[Row]:
    """Measures the calls of the demo's training step, and says what won; nothing where a variable
    of the environment says that no table is used."""
    heading(
        console, "1. Tuning", "which implementation is the fastest here, for this model's calls"
    )
    if switched_off() or not tuned_files.switched_on():
        console.print("switched off by GPTKERNELS_TUNE or GPTKERNELS_IMPL: nothing is measured")
        return []
    on_gpu = device.type == "cuda"
    config, batch = training.size(on_gpu)
    with console.status("measuring"):
        classes = classes_of(
            config,
            torch.bfloat16 if on_gpu else torch.float32,
            device,
            batch=batch,
            tokens=config.block_size,
            train=True,
            autocast=on_gpu,
        )
        report = tune(classes, seconds=_SECONDS)
    rows = [row(found) for entry in report.entries for found in explanation.of_entry(entry)]
    table(
        console,
        {
            "op": lambda r: r["class"]["op"],
            "up to": lambda r: explanation.said(r["sizes"]),
            "fastest": lambda r: r["way"],
            "time": lambda r: seconds(r["time_s"]),
            "PyTorch's": lambda r: seconds(r["pytorch_s"]),
        },
        rows,
    )
    if report.left:
        console.print(f"No time was left for {len(report.left)} more classes of calls.")
    return rows
