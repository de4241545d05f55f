"""Attention with options, on a CPU, beside PyTorch's ways to say the same.

    python -m benchmarks.attention_options [--dtype float32] [--tokens 1024] [--json FILE]

The others are `F.scaled_dot_product_attention`, with the option as a mask that is made before, and
compiled `flex_attention`, forward only: PyTorch has no backward pass of it on a CPU. "one head" is
what is left where threads cannot share the heads. Medians of rounds in which all take turns; a
ratio is the other's time over ours: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gptkernels
from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.timing import compare

_WINDOW, _CAP = 256, 20.0


class Case(NamedTuple):
    """One option, said three ways; None where PyTorch cannot say it so."""

    name: str
    heads: int
    ours: dict[str, Any]
    plain: dict[str, Any] | None
    flex: dict[str, Any] | None


def cases(tokens: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """All options. What is added to scores is in the dtype of q, as PyTorch wants it."""
    away = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)])
    causal, near = away >= 0, (away >= 0) & (away <= _WINDOW)
    some = torch.rand(tokens, tokens) < 0.8
    some.fill_diagonal_(True)

    def bias(seen: Tensor) -> Tensor:
        return torch.zeros(tokens, tokens).masked_fill(~seen, float("-inf"))

    def blocks(seen: Callable[..., Any]) -> Any:
        return create_block_mask(seen, None, None, tokens, tokens, device="cpu")

    lower = blocks(lambda b, h, i, j: i >= j)
    band = blocks(lambda b, h, i, j: (i >= j) & (i - j <= _WINDOW))
    capped = {"score_mod": lambda s, b, h, i, j: _CAP * torch.tanh(s / _CAP)}
    sloped = {"score_mod": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()}
    alibi = (bias(causal) - away.abs() * slopes[:, None, None])[None].to(dtype)
    yield Case("causal", heads, {}, {"is_causal": True}, {"block_mask": lower})
    yield Case("one head", 1, {}, {"is_causal": True}, {"block_mask": lower})
    window = {"window": (_WINDOW, 0)}
    yield Case("window", heads, window, {"attn_mask": near}, {"block_mask": band})
    yield Case("softcap", heads, {"softcap": _CAP}, None, {"block_mask": lower} | capped)
    by_slope = {"alibi_slopes": slopes}
    yield Case("ALiBi", heads, by_slope, {"attn_mask": alibi}, {"block_mask": lower} | sloped)
    for name, mask in (
        ("bool mask, 8 of 10 seen", some),
        ("bool mask, causal", causal),
        ("added mask, causal", bias(causal).to(dtype)),
        ("added mask, random", torch.randn(tokens, tokens).to(dtype)),
    ):
        yield Case(name, heads, {"attn_mask": mask, "causal": False}, {"attn_mask": mask}, None)


def calls(case: Case, tokens: int, width: int, dtype: torch.dtype, backward: bool) -> Any:
    """Name -> call, of all that can do this case."""
    q, k, v = (
        torch.randn(1, tokens, case.heads, width).to(dtype).requires_grad_(backward)
        for _ in range(3)
    )
    rows = [x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in (q, k, v)]
    dout = torch.randn(1, tokens, case.heads, width).to(dtype)

    def whole(forward: Callable[[], Any], inputs: Any, gradient: Tensor) -> Callable[[], Any]:
        if not backward:
            return forward
        return lambda: torch.autograd.grad(forward(), inputs, gradient)

    found = {"cpu": lambda: gptkernels.attention(q, k, v, impl="cpu", **case.ours)}
    turned = dout.transpose(1, 2).contiguous()
    if case.plain is not None:
        plain: Any = F.scaled_dot_product_attention
        found["plain"] = lambda: plain(*rows, **case.plain or {})
    if case.flex is not None and not backward:
        flex: Any = torch.compile(flex_attention)
        found["flex"] = lambda: flex(*rows, **case.flex or {})
    return {
        name: whole(call, (q, k, v) if name == "cpu" else rows, dout if name == "cpu" else turned)
        for name, call in found.items()
    }


def main() -> None:
    """Prints one line for each option and direction."""
    parser = argparse.ArgumentParser("python -m benchmarks.attention_options", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype, rows = getattr(torch, options.dtype), []
    for case in cases(options.tokens, options.heads, dtype):
        for direction in ("forward", "forward + backward"):
            if options.only not in case.name:
                continue
            made = calls(case, options.tokens, options.width, dtype, direction != "forward")
            with torch.set_grad_enabled(direction != "forward"):
                found = compare(
                    made, device="cpu", min_rounds=options.rounds, max_rounds=options.rounds
                )
            ratios = {
                name: timing.time_s / found["cpu"].time_s
                for name, timing in found.items()
                if name != "cpu"
            }
            line = "   ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
            print(f"{case.name:<25} {direction:<20} {1e3 * found['cpu'].time_s:7.2f} ms   {line}")
            row = {"case": case.name, "direction": direction, "ratios": ratios}
            rows.append(row | {name: t.as_dict() for name, t in found.items()})
    print("load average", *(f"{load:.2f}" for load in os.getloadavg()))
    if options.json:
        named = {name: getattr(options, name) for name in ("dtype", "tokens", "heads", "width")}
        write_json(options.json, {"environment": environment(), **named, "rows": rows})


if __name__ == "__main__":
    main()
