"""A training step under torch.compile: gptkernels.GPT with impl="torch" beside the plain twin.

    python -m benchmarks.compiled_step [--dtype bfloat16] [--layers 4 ...] [--json FILE]

A step is the loss and all gradients, without an optimizer, which would be the same in both. Both
have the same weights and are compiled by Inductor as one graph. Seconds: medians of rounds in which
the two take turns, with the quartiles. The ratio is plain PyTorch's median over ours: above 1 ours
is faster. The load average says whether the machine did other work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gptkernels
from gptkernels.bench.report import environment, write_json
from gptkernels.bench.timing import BASELINE, compare
from gptkernels.truth.plain_gpt import PlainGPT


def step(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> Callable[[], Any]:
    """Returns a call of one step of the compiled model."""
    compiled = torch.compile(model, fullgraph=True)

    def call() -> None:
        model.zero_grad()
        compiled(tokens, targets).backward()

    return call


def main() -> None:
    """Prints one line for each candidate, and the ratio."""
    parser = argparse.ArgumentParser("python -m benchmarks.compiled_step", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"layers": 4, "heads": 6, "width": 384, "tokens": 256, "batch": 4, "vocabulary": 512}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    config = gptkernels.GPTConfig(
        vocab_size=options.vocabulary, block_size=options.tokens, n_layer=options.layers,
        n_head=options.heads, n_embd=options.width, dropout=options.dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    made = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    ours, plain = gptkernels.GPT(config).to(**made), PlainGPT(config).to(**made)
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(config.vocab_size, (2, options.batch, options.tokens)).to(options.device)
    steps = {BASELINE: step(plain, *ids), "torch": step(ours.set_impl("torch"), *ids)}
    rounds = options.rounds
    found = compare(steps, device=options.device, min_rounds=rounds, max_rounds=rounds)
    for impl, timing in found.items():
        print(f"{impl:<8} {timing.time_s:.4f} s  ({timing.low_s:.4f}-{timing.high_s:.4f})")
    ratio, load = found[BASELINE].time_s / found["torch"].time_s, os.getloadavg()
    print(f"ratio {ratio:.3f}   load average {load[0]:.2f} {load[1]:.2f}")
    if options.json:
        named = {name: getattr(options, name) for name in (*sizes, "dtype", "device", "dropout")}
        content = {"environment": environment(), **named, "ratio": ratio}
        rows = [{"impl": impl, **dataclasses.asdict(timing)} for impl, timing in found.items()]
        write_json(options.json, content | {"rows": rows})


if __name__ == "__main__":
    main()
