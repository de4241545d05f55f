"""What a call costs beside its work: the ops on tensors so small that nothing else counts.

    python -m benchmarks.call_path [--json FILE]

Microseconds of a forward call, where no input requires a gradient and where all do: of plain
PyTorch, of each implementation that runs here, and of "auto". Medians of rounds in which all take
turns, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import gptkernels
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_file
from gptkernels.core.choice import unavailable

_ROUNDS, _CALLS = 60, 100


def cases() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], list[torch.Tensor]]]:
    """Yields (name, plain PyTorch, ours, tensors)."""
    draw = torch.randn
    row = [draw(1, 8), draw(8), draw(8), draw(1, 8)]
    yield "layer_norm + residual", _plain_norm, _norm, row
    mlp = [draw(1, 8), draw(16, 8), draw(16), draw(8, 16), draw(8)]
    yield "gelu_mlp", _plain_mlp, gptkernels.gelu_mlp, mlp
    heads = [draw(1, 2, 1, 8) for _ in range(3)]
    yield "attention", _plain_attention, gptkernels.attention, heads


def _plain_norm(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    return F.layer_norm(x + residual, (8,), weight, bias)


def _norm(x: Any, weight: Any, bias: Any, residual: Any, **how: Any) -> Any:
    return gptkernels.layer_norm(x, weight, bias, residual=residual, prenorm=True, **how)


def _plain_mlp(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def _plain_attention(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def measured(candidates: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Returns the lower quartile, the median and the upper quartile of a call's microseconds."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(_ROUNDS + 5):
        for name, call in candidates.items():
            started = time.perf_counter()
            for _ in range(_CALLS):
                call()
            took = (time.perf_counter() - started) / _CALLS * 1e6
            if turn >= 5:
                found[name].append(took)
    return {name: statistics.quantiles(all_, n=4) for name, all_ in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.call_path", description=__doc__)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    rows = []
    for name, plain, ours, tensors in cases():
        impls = [i for i in ("torch", "cpu") if unavailable(i, "cpu", torch.float32) is None]
        impls.append("auto")
        for gradients in (False, True):
            leaves = [x.clone().requires_grad_(gradients) for x in tensors]

            def call(f: Callable[..., Any], leaves: Any = leaves, **how: Any) -> Callable[[], Any]:
                return lambda: f(*leaves, **how)

            calls = {"pytorch": call(plain)} | {i: call(ours, impl=i) for i in impls}
            for impl, (low, median, high) in measured(calls).items():
                row = dict(op=name, gradients=gradients, impl=impl)
                rows.append(row | dict(low_us=low, median_us=median, high_us=high))
                kept = "with" if gradients else "without"
                print(f"{name:<22} {kept:<8} {impl:<8} {median:6.1f} us  ({low:.1f}-{high:.1f})")
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
