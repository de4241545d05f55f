"""What the ops of `gptkernels bench` do not show alone, on a CPU: GELU's passes, dropout, the
products of a decode step, and what guessed tokens cost.

    python -m benchmarks.cpu_passes [--what WORDS] [--json FILE]

GELU forward, and backward with the bias's gradient, beside PyTorch's. Then each op with dropout
beside itself without: the ratio is what dropout costs. Then all linear layers of GPT-2 124M and its
head, once each, as for the next token of so many texts: their weights come from memory; and the
layers without the head where weights lie transposed, as Conv1D's. Then a step
of GPT-2 124M behind 500 tokens, on four new tokens beside one: the ratio is what three guesses
cost. Medians of rounds in which both take turns.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import gptkernels
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.timing import compare
from gptkernels.core import few_rows
from gptkernels.core.arguments import new_file
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.ops.gelu_mlp import cpu

_DTYPES = (torch.bfloat16, torch.float32)

# (what, dtype, the one that the ratio divides, the other)
Pair = tuple[str, torch.dtype, Callable[[], Any], Callable[[], Any]]


def gelu() -> Iterator[Pair]:
    """PyTorch's pass, and ours."""
    for dtype in _DTYPES:
        h, da = (torch.randn(512, 3072).to(dtype) for _ in range(2))
        a, db = torch.empty_like(h), torch.empty(3072, dtype=dtype)

        def plain(h: Any = h, da: Any = da) -> Any:
            dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
            return dh, dh.sum(0), F.gelu(h, approximate="tanh")

        def ours(h: Any = h, da: Any = da, a: Any = a, db: Any = db) -> Any:
            cpu.gelu_backward(h, da, torch.empty_like(da), a, db, "tanh")

        forward = functools.partial(F.gelu, h, approximate="tanh")
        yield "GELU 512 x 3072, forward", dtype, forward, functools.partial(cpu.gelu, h, a, "tanh")
        yield "GELU 512 x 3072, backward", dtype, plain, ours


def dropout() -> Iterator[Pair]:
    """With dropout, and without."""
    for dtype in _DTYPES:
        x, residual = (torch.randn(512, 768).to(dtype) for _ in range(2))
        weight = torch.ones(768, dtype=dtype)
        q, k, v = (torch.randn(1, 512, 12, 64).to(dtype) for _ in range(3))

        def norm(p: float, x: Any = x, weight: Any = weight, residual: Any = residual) -> Any:
            return gptkernels.layer_norm(x, weight, residual=residual, dropout_p=p, prenorm=True)

        def attention(p: float, q: Any = q, k: Any = k, v: Any = v) -> Any:
            return gptkernels.attention(q, k, v, dropout_p=p)

        for name, call in (("layer_norm 512 x 768", norm), ("attention 512 x 12 x 64", attention)):
            with_, without = (functools.partial(call, p) for p in (0.1, 0.0))
            yield f"dropout of {name}", dtype, with_, without


def guesses() -> Iterator[Pair]:
    """A step on four tokens, and on one."""
    for dtype in _DTYPES:
        model = gptkernels.GPT(gptkernels.GPTConfig()).to(dtype).eval()
        cache = SlotCache(model, 1, 512)
        tokens = torch.randint(50257, (1, 500))
        with torch.no_grad():
            model(tokens, cache=cache, slot=0)

        @torch.no_grad()
        def step(count: int, model: Any = model, cache: Any = cache, tokens: Any = tokens) -> Any:
            cache.cut(0, 500)
            return model(tokens[:, :count], cache=cache)

        four, one = (functools.partial(step, count) for count in (4, 1))
        yield "a step on 4 tokens beside 1", dtype, four, one


def decode_step() -> Iterator[Pair]:
    """PyTorch's products, and ours."""
    sizes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12 + [(50257, 768)]
    for dtype in (*_DTYPES, torch.float16):
        weights = [torch.randn(size).mul_(0.02).to(dtype) for size in sizes]
        for rows in (1, 8, 16):
            inputs = {K: torch.randn(rows, K).to(dtype) for K in (768, 3072)}

            def step(linear: Any, weights: Any = weights, inputs: Any = inputs) -> None:
                for weight in weights:
                    linear(inputs[weight.shape[1]], weight, None)

            plain, ours = (functools.partial(step, f) for f in (F.linear, few_rows.linear))
            yield f"products of a decode step, {rows} rows", dtype, plain, ours
            if rows not in few_rows.TRANSPOSED_ROWS[dtype]:
                continue
            lying = [weight.t().contiguous().t() for weight in weights[:-1]]
            plain, ours = (functools.partial(step, f, lying) for f in (F.linear, few_rows.linear))
            yield f"the same, transposed, {rows} rows", dtype, plain, ours


def main() -> None:
    """Prints one line for each pair."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpu_passes", description=__doc__)
    parser.add_argument("--what", default="", help="only the lines that say so")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    rows = []
    for pairs in (gelu(), dropout(), decode_step(), guesses()):
        for what, dtype, one, other in pairs:
            if options.what not in what:
                continue
            found = compare({"one": one, "other": other}, budget_s=1.0)
            ratio = found["one"].time_s / found["other"].time_s
            times = {name: timing.as_dict() for name, timing in found.items()}
            rows.append({"what": what, "dtype": str(dtype), "ratio": ratio, **times})
            print(f"{what:<36} {str(dtype).removeprefix('torch.'):<9} {ratio:.2f}x")
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
