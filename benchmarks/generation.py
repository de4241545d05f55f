"""Tokens a second of `generate`: "auto" beside impl="torch" and beside transformers' generate.

    python -m benchmarks.generation [--dtype bfloat16] [--batch 8] [--json FILE]
    python -m benchmarks.generation --prompt 1000 --tokens 1       # the time to the first token

A GPT-2 of 124M parameters with random weights continues random prompts, taking the likeliest token
each time. All candidates have the same weights. Medians of rounds in which they take turns; a ratio
is the other's time over that of "auto". transformers is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptkernels
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.timing import compare


def candidates(
    config: gptkernels.GPTConfig,
    dtype: torch.dtype,
    device: str,
    prompts: Tensor,
    count: int,
    compiled: bool,
) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call that returns the prompts with `count` tokens more."""
    found: dict[str, Callable[[], Tensor]] = {}
    ours = gptkernels.GPT(config).to(device=device, dtype=dtype)
    for impl in ("auto", "torch"):

        def call(impl: str = impl) -> Tensor:
            ours.set_impl(impl)
            slots = prompts.shape[0]
            return ours.generate(prompts, count, temperature=0, slots=slots)

        found[impl] = call
    try:
        import transformers
    except ImportError:
        return found
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs: Any = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
        theirs.to(torch.device(device)).eval()

    def generate(model: Any = theirs, **more: Any) -> Tensor:
        given = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
        limits = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        tokens: Tensor = model.generate(prompts, **given, **limits, **more)
        return tokens

    found["transformers"] = generate
    if compiled:
        static = copy.deepcopy(theirs)
        static.forward = torch.compile(static.forward)
        found["transformers, static cache, compiled"] = functools.partial(
            generate, static, cache_implementation="static"
        )
    return found


def most_steps(config: gptkernels.GPTConfig, dtype: torch.dtype, device: str) -> float:
    """How often a second as many bytes can be read as a step's weights have: the fastest of some
    sums over them."""
    with torch.device("meta"):
        model = gptkernels.GPT(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    numbers -= model.transformer.wpe.weight.numel()
    there = torch.ones(numbers * dtype.itemsize // 4, device=device)
    return 1 / compare({"read": there.sum}, device=device, min_rounds=20)["read"].min_s


def main() -> None:
    """Prints one line for each candidate, and the limit that memory sets."""
    parser = argparse.ArgumentParser("python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"batch": 1, "prompt": 32, "tokens": 32, "layers": 12, "heads": 12, "width": 768}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--compiled", action="store_true", help="transformers' static cache under torch.compile too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    if options.batch != 1 and options.batch % 8:
        parser.error("--batch must be 1 or a multiple of 8, as generate has slots")
    config = gptkernels.GPTConfig(
        n_layer=options.layers, n_head=options.heads, n_embd=options.width
    )
    torch.manual_seed(0)
    prompts = torch.randint(config.vocab_size, (options.batch, options.prompt)).to(options.device)
    dtype = getattr(torch, options.dtype)
    calls = candidates(config, dtype, options.device, prompts, options.tokens, options.compiled)
    load = os.getloadavg()[0]
    timings = compare(calls, device=options.device, budget_s=30.0, max_rounds=10)
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        rate = options.batch * options.tokens / timing.time_s
        ratio = timing.time_s / timings["auto"].time_s
        rows[name] = {**timing.as_dict(), "tokens_per_s": rate, "ratio": ratio}
        print(f"{name:<36} {rate:7.1f} tokens/s    {ratio:.2f}x")
    limit = options.batch * most_steps(config, dtype, options.device)
    print(f"{'reading the weights once a step':<36} {limit:7.1f} tokens/s at most")
    if options.json:
        record = {k: v for k, v in vars(options).items() if k != "json"}
        content = {"environment": environment(), "load": load, "options": record}
        content |= {"rows": rows, "most_tokens_per_s": limit}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
