"""The first table of README.md, from the committed results.

    python -m benchmarks.readme

How many times as fast as PyTorch the package is on a CPU, by default. A test holds the page to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_DTYPES = ("bfloat16", "float32")


def lines() -> Iterator[str]:
    """Yields the lines of the table, in Markdown."""
    yield "| on a CPU with AMX, 2 cores | beside | bfloat16 | float32 |"
    yield "| --- | --- | ---: | ---: |"
    for what, beside, ratios in _rows():
        yield f"| {what} | {beside} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |"


def _rows() -> Iterator[tuple[str, str, list[float]]]:
    both, eager = "forward+backward", "eager PyTorch"
    causal = ("cpu_attention_amx", "attention", "B1 T1024 H12 D64 causal")
    yield "attention, 1,024 tokens, forward", eager, _bench(*causal, "forward")
    yield "attention, forward and backward", eager, _bench(*causal, both)
    yield "attention with a window of 256, forward", "compiled FlexAttention", _window()
    norm = ("cpu_avx512_bf16", "layer_norm", "B1 T1024 C768 +residual")
    yield "residual add and LayerNorm, 1,024 rows, forward", eager, _bench(*norm, "forward")
    mlp = ("cpu_avx512_bf16", "gelu_mlp", "B1 T512 C768 F3072")
    yield "GELU MLP, 512 rows, forward", eager, _bench(*mlp, "forward")
    yield "a training step, 4 layers of 384", eager, _steps("auto beside plain")
    compiled = "auto beside plain, compiled"
    yield "the same", "`torch.compile`", _steps(compiled)
    for what, case in (
        ("a step of transformers' GPT-2 124M with its dropout, `accelerate`d", "step, dropout 0.1"),
        ("its `generate`, 1 text", "generate, 1"),
    ):
        yield what, "the model untouched", _dropin(case)
    for texts in (1, 8):
        what = f"`generate`, GPT-2 124M, {texts} text{'s' if texts > 1 else ''}"
        yield what, "transformers", _generation(texts)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _bench(file: str, op: str, shape: str, direction: str) -> list[float]:
    found = {
        row["dtype"]: row["ratio"]
        for row in _read(file)["rows"]
        if (row["op"], row["shape"], row["direction"]) == (op, shape, direction)
        and row["impl"] == "cpu"
    }
    return [found[dtype] for dtype in _DTYPES]


def _window() -> list[float]:
    files = [_read(f"attention_options_{dtype}")["rows"] for dtype in _DTYPES]
    wanted = ("window", "forward")
    return [
        next(row["ratios"]["flex"] for row in rows if (row["case"], row["direction"]) == wanted)
        for rows in files
    ]


def _steps(name: str) -> list[float]:
    return [_read(f"training_step_{dtype}")["ratios"][name] for dtype in _DTYPES]


def _dropin(case: str) -> list[float]:
    found = {
        row["dtype"]: row["ratio"]
        for row in _read("dropin")["rows"]
        if (row["family"], row["what"]) == ("GPT-2 124M", case)
    }
    return [found[dtype] for dtype in _DTYPES]


def _generation(texts: int) -> list[float]:
    files = (_read(f"generation_{dtype}_{texts}") for dtype in _DTYPES)
    return [file["rows"]["transformers"]["ratio"] for file in files]


if __name__ == "__main__":
    print("\n".join(lines()))
