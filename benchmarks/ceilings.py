"""What this machine is held to, measured many times: how well a ceiling is known.

    python -m benchmarks.ceilings [--repeat 10] [--device cpu] [--json FILE]

Each repetition measures every rate once: copies and sums of several working sets, and products of
several sizes in three dtypes (`gptkernels.core.ceilings`). A line has the least, the median and the
best of them; the best one is the ceiling, and "spread" says how far the median lies below it.
Nothing is kept: a run of `gptkernels bench` measures for itself.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.bench.text import byte_rate, flop_rate
from gptkernels.core import ceilings
from gptkernels.core.arguments import new_file

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    """Prints one line for each rate."""
    parser = argparse.ArgumentParser("python -m benchmarks.ceilings", description=__doc__)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers too")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for name, rate in ceilings.one_pass(torch.device(options.device), _DTYPES):
            found.setdefault(name, []).append(rate)
    rows = []
    print(f"{'':<26} {'least':>15} {'median':>15} {'best':>15}  spread")
    for name, rates in found.items():
        figures = min(rates), statistics.median(rates), max(rates)
        said = byte_rate if name.startswith("memory") else flop_rate
        share = 1 - figures[1] / figures[2]
        print(f"{name:<26} " + " ".join(f"{said(f):>15}" for f in figures) + f"  {share:.0%}")
        rows.append({"name": name, "least": figures[0], "median": figures[1], "best": figures[2]})
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
