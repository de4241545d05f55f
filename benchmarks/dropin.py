"""`gptkernels.accelerate` on models that people have, beside the same models untouched.

    python -m benchmarks.dropin [--family GPT-2 ...] [--dtype float32 ...] [--json FILE]

Each family has 4 layers of 512, 8 heads, 2 texts of 512 tokens; "GPT-2 124M" is GPT-2's own size
with one text of 1,024. A step is the loss and all gradients, without dropout and with 0.1;
inference is a call without gradients; generate makes 32 tokens behind 32, for one text and for
eight, where the model has it; --what NAME takes only those cases whose names begin so. Both models
take turns, with the same weights, in one process. A ratio is the untouched model's median over that
of the accelerated one: above 1 the accelerated one is faster.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gptkernels
from benchmarks.families import LANGUAGE_MODELS, OTHERS, Size, logits
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.timing import compare
from gptkernels.core.arguments import new_file

_SMALL = Size(layers=4, heads=8, width=512, tokens=512, vocabulary=512)
_LARGE = Size(layers=12, heads=12, width=768, tokens=1024, vocabulary=50257)
_WHOLE = "GPT-2 124M"
_MAKERS = {_WHOLE: LANGUAGE_MODELS["GPT-2"], **LANGUAGE_MODELS, **OTHERS}
_NEW_TOKENS = 32


def step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], Any]:
    """A call of one training step, without an optimizer."""

    def call() -> None:
        model.train().zero_grad()
        found = logits(model(tokens)).flatten(0, 1).float()
        F.cross_entropy(found, tokens.flatten()).backward()

    return call


def inference(model: nn.Module, tokens: torch.Tensor) -> Callable[[], Any]:
    """A call without gradients."""
    model.eval()

    @torch.no_grad()
    def call() -> Any:
        return model(tokens)

    return call


def generation(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    """A call that generates."""
    model.eval()
    more = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "pad_token_id": 2}
    return lambda: model.generate(tokens, do_sample=False, **more)


def cases(
    family: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[nn.Module], Callable[[], Any]], nn.Module]]:
    """Yields what is measured, a function of a model that makes the call, and the model."""
    size = _LARGE if family == _WHOLE else _SMALL
    batch = 1 if family == _WHOLE else 2
    tokens = torch.randint(3, size.vocabulary, (batch, size.tokens))
    for dropout in (0.0, 0.1):
        torch.manual_seed(0)
        model = _MAKERS[family](dataclasses.replace(size, dropout=dropout)).to(dtype)
        yield f"step, dropout {dropout:g}", functools.partial(step, tokens=tokens), model
    yield "inference", functools.partial(inference, tokens=tokens), model
    if hasattr(model, "generate"):
        for texts in (1, 8):
            prompt = torch.randint(3, size.vocabulary, (texts, 32))
            yield f"generate, {texts}", functools.partial(generation, tokens=prompt), model


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser("python -m benchmarks.dropin", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=_MAKERS, default=list(_MAKERS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--what", help="only cases whose name begins so")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    rows = []
    for family in options.family:
        for dtype in options.dtype:
            for what, call, model in cases(family, getattr(torch, dtype)):
                if not what.startswith(options.what or ""):
                    continue
                ours = copy.deepcopy(model)
                gptkernels.accelerate(ours)
                rounds = {"min_rounds": options.rounds, "max_rounds": options.rounds}
                found = compare({"untouched": call(model), "ours": call(ours)}, **rounds)
                ratio = found["untouched"].time_s / found["ours"].time_s
                named = {"family": family, "dtype": dtype, "what": what, "ratio": ratio}
                print(
                    f"{family:<34} {dtype:<9} {what:<18} {ratio:5.2f}x"
                    f"  {found['untouched'].time_s:.3f} -> {found['ours'].time_s:.3f} s"
                    f" ({found['ours'].low_s:.3f}-{found['ours'].high_s:.3f})",
                    flush=True,
                )
                timed = {name: timing.as_dict() for name, timing in found.items()}
                rows.append(named | timed)
    print("load average", *(f"{load:.2f}" for load in os.getloadavg()))
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
