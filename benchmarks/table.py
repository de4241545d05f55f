"""The tables of docs/, from committed results.

    python -m benchmarks.table --bench benchmarks/results/bench_full.json

Of the ops in `gptkernels bench`: one line for each shape and dtype, how many times as fast the
default is as plain PyTorch, and as the fastest of all others, with its name.

    python -m benchmarks.table --models benchmarks/results/bench_full.json

Of whole models: tokens a second, and how many times as fast the default is as each other.

    python -m benchmarks.table benchmarks/results/cpu_{avx512_bf16,avx2}.json
    python -m benchmarks.table benchmarks/results/cpu_attention_{avx512_bf16,avx2}.json

Of several instruction sets: two columns for each file, forward, and forward and backward together,
beside eager PyTorch.

    python -m benchmarks.table --dropin benchmarks/results/dropin{,_inference}.json

How many times as fast accelerated models are as the same untouched.

    python -m benchmarks.table --ceilings benchmarks/results/ceilings.json

How well the ceilings are known. Tests hold the pages to these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptkernels.bench import MODELS
from gptkernels.bench.results import case_of
from gptkernels.bench.text import byte_rate, flop_rate, size
from gptkernels.ops.attention.plan import MOST_TOKENS

_DIRECTIONS = {"forward": "forward", "forward+backward": "forward and backward"}


def bench_table(path: Path | str) -> Iterator[str]:
    """Yields the lines of the table of a run of `gptkernels bench`, in Markdown."""
    rows = [row for row in _read(path)["rows"] if _is_default(row) and not _of_model(row)]
    heads = " | ".join(f"{name} | beside the best" for name in _DIRECTIONS.values())
    yield f"| op and shape | dtype | {heads} |"
    yield f"| --- | --- |{' ---: | ---: |' * len(_DIRECTIONS)}"
    found = {(row["op"], row["shape"], row["dtype"], row["direction"]): row for row in rows}
    # Ops stand together; the order of their shapes stays.
    for op, shape, dtype in dict.fromkeys(key[:3] for key in sorted(found, key=lambda k: k[0])):
        cells = []
        for direction in _DIRECTIONS:
            row = found.get((op, shape, dtype, direction), {})
            best = f" {row['best_peer']}" if row.get("best_peer") else ""
            cells += [_cell(row.get("ratio")), _cell(row.get("peer_ratio")) + best]
        yield f"| `{op}` {shape} | {dtype} | {' | '.join(cells)} |"


def models_table(path: Path | str) -> Iterator[str]:
    """Yields the lines of the table of whole models, in Markdown."""
    rows = [r for r in _read(path)["rows"] if _of_model(r) and r["time_s"] is not None]
    names = {"pytorch": "eager PyTorch"}
    names |= {row["impl"]: row["impl"] for row in rows if row["kind"] == "peer"}
    heads = " | ".join(names.values())
    yield f"| model | dtype | tokens a second | of the ceiling | memory | {heads} |"
    yield f"| --- | --- |{' ---: |' * (3 + len(names))}"
    for ours in filter(_is_default, rows):
        case = {r["impl"]: r for r in rows if case_of(r) == case_of(ours)}
        ratios = (case[n]["time_s"] / ours["time_s"] if n in case else None for n in names)
        share = "" if ours["efficiency"] is None else f"{ours['efficiency']:.0%}"
        memory = "" if ours["peak_bytes"] is None else size(ours["peak_bytes"])
        figures = [f"{ours['tokens_per_s']:,.0f}", share, memory, *map(_cell, ratios)]
        what = ours["op"].removeprefix("gpt_").replace("_", " ")
        yield f"| {what}, {ours['shape']} | {ours['dtype']} | {' | '.join(figures)} |"


def instruction_sets_table(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yields the lines of the table of several instruction sets, in Markdown."""
    files = [_read(path) for path in paths]
    sets = [file["environment"]["cpu"]["instruction_set"] for file in files]
    heads = " | ".join(f"`{name}` forward | `{name}` + backward" for name in sets)
    yield f"| op and shape | dtype | {heads} |"
    yield f"| --- | --- |{' ---: | ---: |' * len(sets)}"
    ratios = [dict(_ratios(file["rows"])) for file in files]
    for op, shape, dtype in dict.fromkeys(key[:3] for found in ratios for key in found):
        cells = [
            _cell(found.get((op, shape, dtype, direction)))
            for found in ratios
            for direction in _DIRECTIONS
        ]
        yield f"| `{op}` {shape.removeprefix('B1 ')} | {dtype} | {' | '.join(cells)} |"


def dropin_table(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yields the lines of the table of accelerated models, in Markdown."""
    rows = [row for path in paths for row in _read(path)["rows"]]
    found = {(row["family"], row["dtype"], row["what"]): row["ratio"] for row in rows}
    columns = list(dict.fromkeys((row["dtype"], row["what"]) for row in rows))
    columns.sort(key=lambda column: column[0])
    yield f"| | {' | '.join(f'{dtype}, {what}' for dtype, what in columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = [_cell(found.get((family, *column))) for column in columns]
        yield f"| {family} | {' | '.join(cells)} |"


def ceilings_table(path: Path | str) -> Iterator[str]:
    """Yields the lines of the table of repeated ceilings, in Markdown."""
    yield "| rate | least | median | best | the median below the best |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in _read(path)["rows"]:
        kind, what, how = row["name"].split()
        memory = kind == "memory"
        name = f"{how} in {size(int(what))}" if memory else f"{what} products of {how}"
        said = byte_rate if memory else flop_rate
        rates = " | ".join(said(row[figure]) for figure in ("least", "median", "best"))
        yield f"| {name} | {rates} | {1 - row['median'] / row['best']:.0%} |"


def _read(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _is_default(row: dict[str, Any]) -> bool:
    """Whether a row is of what users get, impl="auto"."""
    return row["time_s"] is not None and row["impl"] == _default(row)


def _default(row: dict[str, Any]) -> str:
    """Whole models are timed with "auto"; the ops with what it takes on a CPU."""
    if _of_model(row):
        return "auto"
    everything = row["op"] == "attention" and row["series"] == "full"
    many = row["op"] == "attention_decode" and row["sizes"]["Tq"] > MOST_TOKENS
    return "torch" if many or (everything and row["dtype"] == "float32") else "cpu"


def _of_model(row: dict[str, Any]) -> bool:
    return bool(row["op"] in MODELS)


def _ratios(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for row in rows:
        if row["impl"] == "cpu" and row.get("ratio"):
            yield (row["op"], row["shape"], row["dtype"], row["direction"]), row["ratio"]


def _cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    for name in ("bench", "models", "dropin", "ceilings"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    if options.bench:
        lines = bench_table(options.files[0])
    elif options.models:
        lines = models_table(options.files[0])
    elif options.ceilings:
        lines = ceilings_table(options.files[0])
    elif options.dropin:
        lines = dropin_table(options.files)
    else:
        lines = instruction_sets_table(options.files)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
