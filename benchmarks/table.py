"""The tables of docs/cpu.md, from results of `gptkernels bench --json`.

    python -m benchmarks.table benchmarks/results/cpu_{avx512_bf16,avx2}.json
    python -m benchmarks.table benchmarks/results/cpu_attention_{amx,avx512_bf16,avx2}.json

One line for each shape and dtype, two columns for each file: how many times as fast as eager
PyTorch impl="cpu" is, forward, and forward and backward together.

    python -m benchmarks.table --options benchmarks/results/attention_options_*.json

One line for each option of attention, three columns for each file of benchmarks.attention_options:
how many times as fast as PyTorch's two ways to say the same.

    python -m benchmarks.table --dropin benchmarks/results/dropin{,_inference}.json

The table of docs/dropin.md: how many times as fast accelerated models are as the same untouched.
Tests hold the pages to these.
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


def dropin_table(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yields the lines of the table of accelerated models, in Markdown."""
    files = (json.loads(Path(path).read_text(encoding="utf-8")) for path in paths)
    rows = [row for file in files for row in file["rows"]]
    found = {(row["family"], row["dtype"], row["what"]): row["ratio"] for row in rows}
    columns = list(dict.fromkeys((row["dtype"], row["what"]) for row in rows))
    columns.sort(key=lambda column: column[0])
    yield f"| | {' | '.join(f'{dtype}, {what}' for dtype, what in columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [_cell(found.get((family, *column))) for column in columns]
        yield f"| {family} | {' | '.join(cells)} |"


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
    match sys.argv[1:]:
        case ["--options", *files]:
            lines = options_table(files)
        case ["--dropin", *files]:
            lines = dropin_table(files)
        case files:
            lines = table(files)
    print("\n".join(lines))
