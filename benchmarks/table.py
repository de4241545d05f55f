"""The tables of docs/cpu.md, from results of `gptkernels bench --json`.

    python -m benchmarks.table benchmarks/results/cpu_{avx512_bf16,avx2}.json
    python -m benchmarks.table benchmarks/results/cpu_attention_{amx,avx512_bf16,avx2}.json

One line for each shape and dtype, two columns for each file: how many times as fast as eager
PyTorch impl="cpu" is, forward, and forward and backward together.

    python -m benchmarks.table --options benchmarks/results/attention_options_*.json

One line for each option of attention, three columns for each file of benchmarks.attention_options:
how many times as fast as PyTorch's two ways to say the same. A test holds the page to this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def table(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yields the lines of the table, in Markdown."""
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    sets = [file["environment"]["cpu"]["instruction_set"] for file in files]
    heads = " | ".join(f"`{name}` forward | `{name}` + backward" for name in sets)
    yield f"| op and shape | dtype | {heads} |"
    yield f"| --- | --- |{' ---: | ---: |' * len(sets)}"
    ratios = [dict(_ratios(file["rows"])) for file in files]
    for op, shape, dtype in dict.fromkeys(key[:3] for found in ratios for key in found):
        cells = [
            _cell(found.get((op, shape, dtype, direction)))
            for found in ratios
            for direction in ("forward", "forward+backward")
        ]
        yield f"| `{op}` {shape.removeprefix('B1 ')} | {dtype} | {' | '.join(cells)} |"


def options_table(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yields the lines of the table of options, in Markdown."""
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    columns = [
        (file, direction, other)
        for file in files
        for direction, other in (
            ("forward", "plain"),
            ("forward + backward", "plain"),
            ("forward", "flex"),
        )
    ]
    names = {"plain": "SDPA", "flex": "FlexAttention"}
    heads = [f"{file['dtype']} {way}, {names[other]}" for file, way, other in columns]
    yield f"| option | {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for case in dict.fromkeys(row["case"] for row in files[0]["rows"]):
        cells = []
        for file, direction, other in columns:
            rows = (r for r in file["rows"] if (r["case"], r["direction"]) == (case, direction))
            row = next(rows, None)
            cells.append(_cell(None if row is None else row["ratios"].get(other)))
        yield f"| {case} | {' | '.join(cells)} |"


def _ratios(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for row in rows:
        if row["impl"] == "cpu" and row.get("ratio"):
            yield (row["op"], row["shape"], row["dtype"], row["direction"]), row["ratio"]


def _cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    of_options = sys.argv[1:2] == ["--options"]
    print("\n".join(options_table(sys.argv[2:]) if of_options else table(sys.argv[1:])))
