"""What a training step holds at most, with the loss by logits and without, on a CPU.

    python -m benchmarks.loss_memory [--batch 8] [--tokens 1024] [--dtype bfloat16] [--json FILE]

One step of GPT-2 124M each, loss and all gradients without an optimizer, in a process of its own:
"logits" is F.cross_entropy of the model's logits in fp32, what GPT.forward computed before
`linear_cross_entropy`; "fused" is GPT.forward with targets. Bytes are those beside the model, its
gradients among them; seconds are those of the one step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from gptkernels.bench.environment import environment
from gptkernels.bench.memory import peak_bytes
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_file
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT

_WAYS = ("logits", "fused")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)  # in a child
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_step(options.way, options.batch, options.tokens, options.dtype)))
        return
    rows = []
    for way in _WAYS:
        command = [sys.executable, "-m", "benchmarks.loss_memory", "--way", way]
        given = ["--batch", str(options.batch), "--tokens", str(options.tokens)]
        child = subprocess.run(
            [*command, *given, "--dtype", options.dtype], stdout=subprocess.PIPE, check=True
        )
        rows.append(json.loads(child.stdout))
        row = rows[-1]
        print(f"{way}: {row['peak_bytes'] / 2**20:,.0f} MiB, {row['seconds']:.1f} s")
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": rows})


def _step(way: str, batch: int, tokens: int, dtype: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT(GPTConfig.named("gpt2")).to(getattr(torch, dtype))
    text = torch.randint(model.config.vocab_size, (batch, tokens))
    targets = text.roll(-1, dims=1)

    def step() -> None:
        if way == "fused":
            loss = model(text, targets)
        else:
            logits = model(text).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()

    started = time.perf_counter()
    peak = peak_bytes(step, torch.device("cpu"))
    shape = {"batch": batch, "tokens": tokens, "dtype": dtype}
    return {"way": way, **shape, "peak_bytes": peak, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
