"""The first table of README.md, from the committed results.

    python -m benchmarks.readme

How many times as fast as PyTorch and others the package is on a CPU, by default. A test holds the
page to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_DTYPES = ("bfloat16", "float32")
_EAGER, _COMPILED = "eager PyTorch", "`torch.compile`"


def lines() -> Iterator[str]:
    """Yields the lines of the table, in Markdown."""
    yield "| on a CPU with AMX, 2 cores | beside | bfloat16 | float32 |"
    yield "| --- | --- | ---: | ---: |"
    for what, beside, ratios in _rows():
        yield f"| {what} | {beside} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |"


def _rows() -> Iterator[tuple[str, str, list[float]]]:
    forward, both = "forward", "forward+backward"
    causal = ("attention", "B1 T1024 H12 D64 causal")
    yield "attention, 1,024 tokens, forward", _EAGER, _bench(*causal, forward)
    yield "attention, forward and backward", _EAGER, _bench(*causal, both)
    window = ("attention", "B1 T1024 H12 D64 causal window 256", forward)
    flex = _bench(*window, other="FlexAttention")
    yield "attention with a window of 256, forward", "compiled FlexAttention", flex
    norm = ("layer_norm", "1024 rows C768 +residual", forward)
    yield "residual add and LayerNorm, 1,024 rows, forward", _EAGER, _bench(*norm)
    yield "the same", _COMPILED, _bench(*norm, other="torch.compile")
    mlp = ("gelu_mlp", "512 rows C768 F3072", forward)
    yield "GELU MLP, 512 rows, forward", _EAGER, _bench(*mlp)
    for what, shape in (
        ("a training step, 4 layers of 384", "GPT 7M B4 T256"),
        ("a training step, GPT-2 124M, a text of 1,024", "GPT-2 124M B1 T1024"),
    ):
        step = ("gpt_training", shape, both)
        yield what, _EAGER, _bench(*step)
        yield "the same", _COMPILED, _bench(*step, other="nanoGPT-shaped, torch.compile")
    for what, part in (
        ("a step of transformers' GPT-2 124M with its dropout, `accelerate`d", "step, dropout 0.1"),
        ("its `generate`, 1 text", "generate, 1"),
    ):
        yield what, "the model untouched", _dropin(part)
    for texts in (1, 8):
        what = f"`generate`, GPT-2 124M, {texts} text{'s' if texts > 1 else ''}"
        case = ("gpt_generate", f"GPT-2 124M B{texts} prompt 32 new 16", forward)
        yield what, "transformers", _bench(*case, other="transformers")


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _bench(op: str, shape: str, direction: str, other: str = "pytorch") -> list[float]:
    """The other's time over that of the default, in each dtype."""
    seconds = {
        (row["dtype"], row["impl"]): row["time_s"]
        for row in _read("bench_full")["rows"]
        if (row["op"], row["shape"], row["direction"]) == (op, shape, direction)
    }
    default = "auto" if op.startswith("gpt_") else "cpu"
    return [seconds[dtype, other] / seconds[dtype, default] for dtype in _DTYPES]


def _dropin(case: str) -> list[float]:
    found = {
        row["dtype"]: row["ratio"]
        for row in _read("dropin")["rows"]
        if (row["family"], row["what"]) == ("GPT-2 124M", case)
    }
    return [found[dtype] for dtype in _DTYPES]


if __name__ == "__main__":
    argparse.ArgumentParser("python -m benchmarks.readme", description=__doc__).parse_args()
    print("\n".join(lines()))
