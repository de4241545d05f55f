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
from gptkernels.bench.case import BASELINE, Case
from gptkernels.bench.cases import gpt_training
from gptkernels.bench.cases.gpt import TWIN, Model
from gptkernels.bench.text import seconds
from gptkernels.cli.demo import training
from gptkernels.cli.demo.terminal import Row, heading, print_reasons, table
from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT

# Beside the demo's model: one that has more to compute for each call.
CPU_WIDER_MODEL = GPTConfig(vocab_size=512, block_size=256, n_layer=4, n_head=6, n_embd=384)


def speed_table(trained: training.Training, console: Console) -> list[Row]:
    """The ops and a whole training step, timed beside plain PyTorch."""
    heading(console, "6. Speed", "median times, alternating with eager PyTorch on the same inputs")
    rows: list[Row] = []
    with console.status("measuring"):
        for op in bench.OPERATORS:
            rows += bench.rows_of(op, trained.device, IMPLEMENTATIONS, "quick")
        rows += measure.rows(_training_steps(trained), device=trained.device, budget_s=3.0)
    rows = [row for row in rows if row["impl"] != BASELINE or "skipped" in row]
    timed = [row for row in rows if row["time_s"] is not None]
    table(
        console,
        {
            "op": lambda r: r["op"],
            "shape": lambda r: r["shape"],
            "dtype": lambda r: r["dtype"],
            "direction": lambda r: r["direction"].replace("forward+backward", "both"),
            "impl": lambda r: r["impl"],
            "time": lambda r: seconds(r["time_s"]),
            "PyTorch's": lambda r: seconds(r["baseline_s"]),
            "speed-up": lambda r: "-" if r["ratio"] is None else f"{r['ratio']:.2f}x",
        },
        timed,
    )
    print_reasons(console, (f"{r['impl']}: {r['skipped']}" for r in rows if "skipped" in r))
    return rows


def _training_steps(trained: training.Training) -> Iterator[Case]:
    """Of GPT-2's 124M shape on a GPU; on a CPU of the demo's model and a wider one. Beside each the
    plain twin, and the twin under torch.compile."""
    if trained.device.type == "cuda":
        wanted = [(GPTConfig.named("gpt2"), 8, torch.bfloat16)]
    else:
        demo = trained.result.model.config
        wanted = [
            (demo, trained.config.batch_size, torch.float32),
            (CPU_WIDER_MODEL, 4, torch.bfloat16),
        ]
    for config, batch, dtype in wanted:
        model = Model(f"{config.n_layer} layers of {config.n_embd}", config)
        shape = gpt_training.Shape(model, batch, config.block_size)
        for case in gpt_training.cases(shape, dtype, trained.device, IMPLEMENTATIONS):
            ours = {name: make for name, make in case.ours.items() if name in IMPLEMENTATIONS}
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
