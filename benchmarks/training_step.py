"""A training step of gptkernels.GPT beside its plain twin, eager and compiled.

    python -m benchmarks.training_step [--dtype bfloat16] [--layers 12 ...] [--memory] [--json FILE]

A step is the loss and all gradients, without an optimizer, which would be the same in all. Both
models have the same weights. Eager, ours takes impl="auto"; under torch.compile, where both are one
graph of Inductor's, it takes impl="torch", as "auto" does there. Seconds: medians of rounds in
which all take turns, with the quartiles. A ratio is plain PyTorch's median, eager or compiled, over
ours: above 1 ours is faster. The load average says whether the machine did other work.

With --memory nothing is timed. It prints the most memory (ru_maxrss) of a process on a CPU that
runs three steps of one candidate, less that of one that makes the model alone.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gptkernels
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.timing import compare
from gptkernels.truth.plain_gpt import PlainGPT


def step(model: nn.Module, ids: torch.Tensor, compiled: bool) -> Callable[[], Any]:
    """Returns a call of one step. ids: tokens and targets."""
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def call() -> None:
        model.zero_grad()
        forward(*ids).backward()

    return call


def candidates(config: gptkernels.GPTConfig, options: argparse.Namespace) -> dict[str, Any]:
    """A call of one step for each candidate."""
    torch.manual_seed(0)
    made = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    ours, plain = gptkernels.GPT(config).to(**made), PlainGPT(config).to(**made)
    plain.load_state_dict(ours.state_dict())
    inside = copy.deepcopy(ours).set_impl("torch")
    ids = torch.randint(config.vocab_size, (2, options.batch, options.tokens)).to(options.device)
    return {
        "plain": step(plain, ids, False),
        "auto": step(ours, ids, False),
        "plain, compiled": step(plain, ids, True),
        "torch, compiled": step(inside, ids, True),
    }


def print_memory(names: Sequence[str]) -> None:
    """Prints what three steps of each candidate take, in MB, each in a process of its own."""

    def most_kb(name: str) -> int:
        child = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--child", name]
        said = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
        return int(said.split()[-1])

    models = most_kb("")
    for name in names:
        print(f"{name:<16} {(most_kb(name) - models) * 1024 / 1e6:8.0f} MB")


def main() -> None:
    """Prints one line for each candidate, and the ratios."""
    parser = argparse.ArgumentParser("python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"layers": 4, "heads": 6, "width": 384, "tokens": 256, "batch": 4, "vocabulary": 512}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    parser.add_argument("--memory", action="store_true", help="memory instead of times, on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = gptkernels.GPTConfig(
        vocab_size=options.vocabulary, block_size=options.tokens, n_layer=options.layers,
        n_head=options.heads, n_embd=options.width, dropout=options.dropout,
    )  # fmt: skip
    steps = candidates(config, options)
    if options.child is not None:
        for _ in range(3 if options.child else 0):
            steps[options.child]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    if options.memory:
        print_memory(list(steps))
        return
    rounds = options.rounds
    found = compare(steps, device=options.device, min_rounds=rounds, max_rounds=rounds)
    for name, timing in found.items():
        print(f"{name:<16} {timing.time_s:.4f} s  ({timing.low_s:.4f}-{timing.high_s:.4f})")
    seconds = {name: timing.time_s for name, timing in found.items()}
    ratios = {
        "auto beside plain": seconds["plain"] / seconds["auto"],
        "auto beside plain, compiled": seconds["plain, compiled"] / seconds["auto"],
        "torch, compiled beside plain, compiled": (
            seconds["plain, compiled"] / seconds["torch, compiled"]
        ),
    }
    for name, ratio in ratios.items():
        print(f"{ratio:.2f}x   {name}")
    print("load average", *(f"{load:.2f}" for load in os.getloadavg()))
    if options.json:
        named = {name: getattr(options, name) for name in (*sizes, "dtype", "device", "dropout")}
        content = {"environment": environment(), **named, "ratios": ratios}
        rows = [{"name": name, **timing.as_dict()} for name, timing in found.items()]
        write_json(options.json, content | {"rows": rows})


if __name__ == "__main__":
    main()
