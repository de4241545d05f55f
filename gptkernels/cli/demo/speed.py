"""The demo's times, and how many CPU threads it runs on."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from rich.console import Console
from torch import nn

from gptkernels import bench
from gptkernels.bench import report, timing
from gptkernels.cli.demo import training
from gptkernels.cli.demo.terminal import Row, heading, print_reasons, table
from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.gpt.training.throughput import flops_per_token
from gptkernels.truth.plain_gpt import PlainGPT

# Beside the demo's model: one that has more to compute for each call.
CPU_WIDER_MODEL = GPTConfig(vocab_size=512, block_size=256, n_layer=4, n_head=6, n_embd=384)


def speed_table(trained: training.Training, console: Console) -> list[Row]:
    """The ops and a whole training step, timed beside plain PyTorch."""
    heading(console, "5. Speed", "median times, alternating with eager PyTorch on the same inputs")
    rows: list[Row] = []
    with console.status("measuring"):
        for op in bench.OPERATORS:
            rows += bench.rows_of(op, trained.device, IMPLEMENTATIONS, quick=True)
        rows += timing.rows(_training_steps(trained), device=trained.device, budget_s=3.0)
    rows = [row for row in rows if row["impl"] != timing.BASELINE or "skipped" in row]
    timed = [row for row in rows if row["time_s"] is not None]
    table(
        console,
        {
            "op": lambda r: r["op"],
            "shape": lambda r: r["shape"],
            "dtype": lambda r: r["dtype"],
            "direction": lambda r: r["direction"].replace("forward+backward", "both"),
            "impl": lambda r: r["impl"],
            "time": lambda r: report.seconds(r["time_s"]),
            "PyTorch's": lambda r: report.seconds(r["baseline_s"]),
            "speed-up": lambda r: "-" if r["ratio"] is None else f"{r['ratio']:.2f}x",
        },
        timed,
    )
    print_reasons(console, (f"{r['impl']}: {r['skipped']}" for r in rows if "skipped" in r))
    return rows


def _training_steps(trained: training.Training) -> Iterator[timing.Case]:
    """Of GPT-2's 124M shape on a GPU; on a CPU of the demo's model and a wider one."""
    if trained.device.type == "cuda":
        yield _training_step(GPTConfig.named("gpt2"), 8, torch.bfloat16, trained.device)
        return
    demo = trained.result.model.config
    yield _training_step(demo, trained.config.batch_size, torch.float32, trained.device)
    yield _training_step(CPU_WIDER_MODEL, 4, torch.bfloat16, trained.device)


def _training_step(
    config: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device
) -> timing.Case:
    """Forward and backward of a whole GPT. Beside it the plain twin, and the twin under
    torch.compile as the implementation "compiled". In 16 bits a GPU computes under autocast, and on
    a CPU the weights are narrow too."""
    on_gpu = device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size), generator=generator)
    tokens = tokens.to(device)
    held = torch.float32 if on_gpu else dtype
    model, twin = GPT(config).to(device, held), PlainGPT(config).to(device, held)
    twin.load_state_dict(model.state_dict())

    def step(network: nn.Module) -> Callable[[], None]:
        parameters = list(network.parameters())

        def call() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                loss = network(tokens, tokens)
            torch.autograd.grad(loss, parameters)

        return call

    flops = flops_per_token(model, config.n_layer, config.n_embd, config.block_size)
    case = timing.Case.beside(
        step(twin),
        lambda impl: step(copy.deepcopy(model).set_impl(impl)),
        IMPLEMENTATIONS,
        device,
        op="gpt",
        shape=f"{config.n_layer} layers, B{batch} T{config.block_size} C{config.n_embd}",
        dtype=dtype,
        direction="forward+backward",
        flops=int(flops * tokens.numel()),
    )
    # Other sizes were compiled before it, and sizes that change would be symbols.
    compiled = torch.compile(copy.deepcopy(twin), dynamic=False)
    case.candidates["compiled"] = step(cast("nn.Module", compiled))
    return case


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
    model = GPT(training.CPU_MODEL)
    tokens = torch.zeros(training.CPU_BATCH, training.CPU_MODEL.block_size, dtype=torch.int64)
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
