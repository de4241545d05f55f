"""The demo's times, and how many CPU threads it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from rich.console import Console

from gptkernels import bench
from gptkernels.bench import measure, timing
from gptkernels.bench.case import Case
from gptkernels.bench.cases import gpt_training
from gptkernels.bench.cases.gpt import TWIN, Model
from gptkernels.bench.report.summary import best_of_ours
from gptkernels.bench.report.words import count
from gptkernels.bench.text import seconds
from gptkernels.cli.console import STYLES, print_text
from gptkernels.cli.demo import training
from gptkernels.cli.demo.terminal import Row, heading
from gptkernels.cli.named import grouped
from gptkernels.cli.table import Column, print_table
from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT

# Beside the demo's model: one that has more to compute for each call.
CPU_WIDER_MODEL = GPTConfig(vocab_size=512, block_size=256, n_layer=4, n_head=6, n_embd=384)


# None is lost: 60 columns have room for all but the case, which then has a line of its own.
_COLUMNS = (
    Column("case"),
    Column("dtype"),
    Column("direction"),
    Column("impl"),
    Column("time", right=True),
    Column("PyTorch's", right=True),
    Column("speed-up", right=True),
)
_STYLES = {"faster": "green", "slower": "red"}


def speed_table(trained: training.Training, console: Console) -> list[Row]:
    """The ops and a whole training step, timed beside plain PyTorch, whose rows are there too."""
    heading(
        console,
        "7. Speed",
        "Median times beside eager PyTorch, in turns on the same inputs; of each case our fastest.",
    )
    device = trained.task.device
    rows: list[Row] = []
    with console.status("measuring"):
        for op in bench.OPERATORS:
            rows += bench.rows_of(op, device, IMPLEMENTATIONS, "quick")
        rows += measure.rows(_training_steps(trained), device=device, budget_s=3.0)
    shown = best_of_ours(rows)
    print_table(
        console,
        _COLUMNS,
        [
            (
                f"{row['op']} {row['shape']}",
                row["dtype"],
                row["direction"].replace("forward+backward", "both"),
                row["impl"],
                seconds(row["time_s"]),
                seconds(row["baseline_s"]),
                "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            )
            for row in shown
        ],
        [_STYLES.get(row["verdict"]) for row in shown],
    )
    verdicts = [row["verdict"] for row in shown]
    print_text(
        console,
        f"Of {count(len(shown), 'case')} {verdicts.count('faster')} are faster than eager PyTorch "
        f"and {verdicts.count('slower')} slower, beyond the spread of the measurement.",
    )
    for line in grouped(rows, "skipped"):
        print_text(console, f"not timed {line}", STYLES["skipped"])
    return rows


def _training_steps(trained: training.Training) -> Iterator[Case]:
    """Of GPT-2's 124M shape on a GPU; on a CPU of the demo's model and a wider one. Beside each the
    plain twin, and the twin under torch.compile."""
    task = trained.task
    if task.device.type == "cuda":
        wanted = [(GPTConfig.named("gpt2"), 8, torch.bfloat16)]
    else:
        wanted = [
            (task.model, task.config.batch_size, torch.float32),
            (CPU_WIDER_MODEL, 4, torch.bfloat16),
        ]
    for config, batch, dtype in wanted:
        model = Model(f"{config.n_layer} layers of {config.n_embd}", config)
        shape = gpt_training.Shape(model, batch, config.block_size)
        for case in gpt_training.cases(shape, dtype, task.device, IMPLEMENTATIONS):
            # Compiled, ours is PyTorch's own operators, and takes as long to compile as the twin.
            ours = {n: make for n, make in case.ours.items() if n != gpt_training.COMPILED}
            twin = {name: make for name, make in case.peers.items() if name.startswith(TWIN)}
            yield dataclasses.replace(case, ours=ours, peers=twin)


@contextlib.contextmanager
def fastest_threads(device: torch.device) -> Iterator[None]:
    """As many CPU threads as PyTorch has, or one where that is faster for a training step.

    Threads wait for each other at every op. Where other programs keep a core busy, two threads
    were measured twenty times slower than one.
    """
    threads = torch.get_num_threads()
    if device.type == "cuda" or threads == 1:
        yield
        return
    config, batch = training.size(on_gpu=False)
    model = GPT(config)
    tokens = torch.zeros(batch, config.block_size, dtype=torch.int64)
    parameters = list(model.parameters())

    def step(count: int) -> None:
        torch.set_num_threads(count)
        torch.autograd.grad(model(tokens, tokens), parameters)

    try:
        timings = timing.compare(
            {str(n): functools.partial(step, n) for n in (threads, 1)}, min_rounds=7
        )
        torch.set_num_threads(int(min(timings, key=lambda name: timings[name].time_s)))
        yield
    finally:
        torch.set_num_threads(threads)
