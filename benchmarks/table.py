"""The tables of docs/cpu.md, from results of `gptkernels bench --json`.

    python -m benchmarks.table benchmarks/results/cpu_{avx512_bf16,avx2}.json
    python -m benchmarks.table benchmarks/results/cpu_attention_{amx,avx2}.json

One line for each shape and dtype, two columns for each file: how many times as fast as eager
PyTorch impl="cpu" is, forward, and forward and backward together. A test holds the page to this.
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


def _ratios(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for row in rows:
        if row["impl"] == "cpu" and row.get("ratio"):
            yield (row["op"], row["shape"], row["dtype"], row["direction"]), row["ratio"]


def _cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1:])))
