"""Predicted times of the CUDA C++ kernels on an H200, from counts and stated rates. No GPU needed.

    python -m gptkernels.bench.predict                     prints the table
    python -m gptkernels.bench.predict --write FILE.md     writes a shorter one between FILE's marks

For every problem of `PROBLEMS`, a dry run (`gptkernels.bench.dry_run`) finds what the launchers
would launch, by their own choice and with each build. The predicted time of a launch is

    time = 3 us (to launch) + max(makespan, bytes / copy rate)

    makespan   the time until all units of work (tiles of output, or blocks of keys) are done. The
               longest unit goes first, and each unit goes to the multiprocessor that is free first.
               There are 132 multiprocessors; a CTA of a kernel for Hopper takes a whole one. Equal
               units take (waves, rounded up) * unit
    unit       steps * step + finish
    step       max(tensor, shared, L2): the time of one slice along the sum, where
      tensor   max(products, other) + x * min(products, other)
      products FLOPs of the whole tile, with its masked elements / (product rate / 132)
      other    exponentials / (16 * clock) + other fp32 operations / (128 * clock) + bytes that
               threads write to shared memory / (128 B * clock): what a warpgroup does between
               products
      shared   bytes of shared memory that wgmma reads and copies write / (128 B * clock)
      L2       bytes read from L2 or written to it / (L2 rate / 132)
    finish     the part of a tile's end that does not overlap with other work

The launchers of the GELU MLP choose among builds by predictions of their own, in clocks
(csrc/gelu_mlp/choice.cpp). For these products the makespan is that prediction. One clock is the
time that a multiprocessor needs for 4,096 FLOPs at the product rate.

x is the share of the shorter of the two, products or other work, that the overlap does not hide:
0.3 with ping-pong, 0.6 without. With these values the formula is within 3% of the 661 and 570
TFLOP/s of FlashAttention-3's ablation (Shah et al., 2024: D 128, 16k tokens, not causal, with and
without warp specialisation). Attention kernels for any GPU get the share of the product rate that
published mma.sync kernels reach. LayerNorm's time is bytes / copy rate, times the rounded-up number
of waves / the number of waves.

Rates: 4.3 TB/s of copying and 785 TFLOP/s of bf16 products, both measured on an H200 by others; a
clock of 1.75 GHz and 7 TB/s of L2, both assumed. These predictions have not been checked on any
GPU. They say what to try first, and `make gpu-tune` will measure what they predict.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptkernels.bench import dry_run
from gptkernels.bench.dry_run import Direction, Launched, Problem

MACHINE = dry_run.MACHINES["sm90"]
COPY_RATE = 4.3e12  # bytes a second, read and written
PRODUCT_RATE = 785e12  # FLOP a second, bf16
L2_RATE = 7e12
CLOCK = 1.75e9
LAUNCH_S = 3e-6
_SHARED_RATE = 128 * CLOCK  # bytes a second of one multiprocessor
_EXPONENTIALS, _OPERATIONS = 16 * CLOCK, 128 * CLOCK  # a second, of one multiprocessor
_EXPOSED = {True: 0.3, False: 0.6}  # x of the formula, with and without ping-pong
_FINISH_S = 0.5e-6  # attention: the last sums, and moving the output to shared memory
_GENERIC_SHARE = {"forward": 0.45, "backward": 0.35}  # attention kernels for any GPU
_CLOCKS_OF_PRODUCTS = PRODUCT_RATE / (4096 * MACHINE.multiprocessors)  # clocks a second

_BF16 = torch.bfloat16
# The most valuable come first. `make gpu-tune` measures the same problems.
PROBLEMS: tuple[Problem, ...] = (
    dry_run.attention(2, 8192, 64, 128, _BF16, kv_heads=8),
    dry_run.gelu_mlp(8192, 4096, 16384, _BF16),
    dry_run.layer_norm(8192, 4096, _BF16, residual=True),
    dry_run.attention(2, 8192, 32, 64, _BF16),
    dry_run.attention(2, 2048, 64, 128, _BF16, kv_heads=8),
    dry_run.attention(2, 8192, 16, 128, _BF16, causal=False),
    dry_run.gelu_mlp(8192, 768, 3072, _BF16),
    dry_run.layer_norm(8192, 768, _BF16, residual=True),
    dry_run.attention(2, 8192, 16, 256, _BF16),
    dry_run.attention(2, 8192, 16, 96, _BF16),
    dry_run.attention(2, 8192, 16, 192, _BF16),
    dry_run.layer_norm(2048, 32768, _BF16, residual=True),
)


@dataclass(frozen=True)
class Part:
    """One direction of a problem, or one product of it: what is predicted and measured as one."""

    problem: Problem
    direction: Direction
    name: str
    pick: Callable[[Sequence[Launched]], Launched]  # its launch, from those of the direction
    cost: Callable[[Launched, int], tuple[float, str]]  # of it and so many launches: s, bound
    flops: float
    bytes: float


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one build, for one direction of a problem or one of its products."""

    op: str
    problem: str
    direction: str
    way: str  # the build's name, or "any GPU"
    build: int  # the build's number; -1: the kernel for any GPU
    chosen: bool  # whether the launcher's rule chooses it
    waves: float
    bound: str  # the name of the largest of the times
    seconds: float
    flops: float
    bytes: float

    @property
    def share(self) -> float:
        """The share that is reached of the product rate or, without products, of the copy rate."""
        if self.flops:
            return self.flops / self.seconds / PRODUCT_RATE
        return self.bytes / self.seconds / COPY_RATE


@dataclass(frozen=True)
class _Step:
    """One step in seconds of one multiprocessor, for each resource."""

    products: float
    shared: float
    l2: float
    other: float

    def seconds(self, exposed: float) -> float:
        hidden = min(self.products, self.other)
        tensor = max(self.products, self.other) + exposed * hidden
        return max(tensor, self.shared, self.l2)

    def bound(self) -> str:
        names = {"products": self.products, "shared": self.shared, "L2": self.l2}
        names["other"] = self.other
        return max(names, key=lambda name: names[name])


def parts(problem: Problem) -> Iterator[Part]:
    """What a problem consists of. Raises ImportError where no module is built."""
    of_op = {"attention": _attention, "gelu_mlp": _mlp, "layer_norm": _layer_norm}
    for direction in problem.directions:
        yield from of_op[problem.op](problem, direction)


def predictions(problems: Iterable[Problem] = PROBLEMS) -> Iterator[Prediction]:
    """Yields a prediction for every build that can take each problem, and marks the rule's choice.

    Raises ImportError where no module with the launchers is built.
    """
    for part in itertools.chain.from_iterable(map(parts, problems)):
        op, text = part.problem.op, part.problem.text
        for index, made, chosen in part.direction.ways(MACHINE, part.pick):
            main = part.pick(made.launches)
            way, waves = main.built["name"] if main.built else "any GPU", main.waves(MACHINE)
            seconds, bound = part.cost(main, len(made.launches))
            yield Prediction(
                op,
                text,
                part.name,
                way,
                index,
                chosen,
                waves,
                bound,
                seconds,
                part.flops,
                part.bytes,
            )


def _or_memory(seconds: float, bound: str, moved: float) -> tuple[float, str]:
    """The time and what bounds it, or memory's where that takes longer."""
    memory = moved / COPY_RATE
    return (memory, "memory") if seconds < memory else (seconds, bound)


# ---- attention


def visible(sizes: dict[str, int], first: int, last: int) -> tuple[int, int]:
    """Returns the range (from, to) of the keys that the queries first ... last - 1 see."""
    shift = sizes["Tk"] - sizes["T"]
    left, right = sizes["left"], sizes["right"]
    low = 0 if left < 0 else max(0, first + shift - left)
    high = sizes["Tk"] if right < 0 else min(sizes["Tk"], last + shift + right)
    return low, max(low, high)


def attention_flops(sizes: dict[str, int], products: int) -> float:
    """Returns the FLOPs of attention with this number of products, without masked pairs."""
    pairs = 0
    for i in range(sizes["T"]):
        low, high = visible(sizes, i, i + 1)
        pairs += high - low
    return products * 2.0 * sizes["B"] * sizes["H"] * sizes["D"] * pairs


def _attention(problem: Problem, direction: Direction) -> Iterator[Part]:
    sizes, forward = problem.sizes, direction.name == "forward"
    flops = attention_flops(sizes, 2 if forward else 5)
    of_head = float(problem.dtype.itemsize * sizes["B"] * sizes["D"])
    of_q, of_k = of_head * sizes["T"] * sizes["H"], of_head * sizes["Tk"] * sizes["Hk"]
    moved = 2 * of_q + 2 * of_k if forward else 4 * of_q + 4 * of_k

    def cost(main: Launched, launches: int) -> tuple[float, str]:
        if main.built is None:
            seconds, bound = flops / (_GENERIC_SHARE[direction.name] * PRODUCT_RATE), "products"
        else:
            units, step = (_forward_units if forward else _backward_units)(sizes, main.built)
            multiplying = makespan(units, MACHINE.multiprocessors)
            seconds, bound = _or_memory(multiplying, step.bound(), moved)
        # What runs before and after the products reads and writes tensors whole; dq is in fp32.
        around = 0.0 if forward else (2 * of_q + 2 * of_q) + (2 * of_q + of_q)
        return seconds + LAUNCH_S * launches + around / COPY_RATE, bound

    yield Part(problem, direction, direction.name, main_launch, cost, flops, moved)


def main_launch(launches: Sequence[Launched]) -> Launched:
    """Returns the launch that computes the products: the one made for Hopper, or the one with the
    most shared memory."""
    return max(launches, key=lambda x: (x.built is not None, x.shared_bytes))


def _forward_units(sizes: dict[str, int], built: dict) -> tuple[list[float], _Step]:
    """Returns the seconds of each tile of queries, and one step."""
    m, n, width = built["tile_m"], built["tile_n"], built["head_width"]
    read = m / 64 * (64 * width + n * width + n * width)  # Q and K, then V; P is in registers
    step = _Step(
        products=4.0 * m * n * width / (PRODUCT_RATE / MACHINE.multiprocessors),
        shared=2.0 * (read + 2 * n * width) / _SHARED_RATE,
        l2=2.0 * 2 * n * width / (L2_RATE / MACHINE.multiprocessors),
        other=m * n * (1 / _EXPONENTIALS + 4 / _OPERATIONS),
    )
    once = step.seconds(_EXPOSED[built["pingpong"]])
    units = []
    for first in range(0, sizes["T"], m):
        low, high = visible(sizes, first, min(first + m, sizes["T"]))
        units += [_steps(low, high, n) * once + _FINISH_S] * (sizes["B"] * sizes["H"])
    return units, step


def _backward_units(sizes: dict[str, int], built: dict) -> tuple[list[float], _Step]:
    """Returns the seconds of each block of keys, for all query heads of its key head, and one
    step."""
    m, n, width = built["tile_m"], built["tile_n"], built["head_width"]
    scores = n / 64 * (64 * width + m * width)  # K or V, and Q or dout, for each warpgroup
    sums = 2 * n / 64 * m * width  # dv and dk: Q and dout again
    dq = m / 64 * (64 * n + n * width)  # dS and K
    stored = 2.0 * m * n + 4.0 * m * width  # dS, and dq in fp32
    step = _Step(
        products=10.0 * m * n * width / (PRODUCT_RATE / MACHINE.multiprocessors),
        shared=(2.0 * (2 * scores + sums + dq + 2 * m * width) + stored + 4.0 * m * width)
        / _SHARED_RATE,
        l2=(2.0 * 2 * m * width + 4.0 * m * width) / (L2_RATE / MACHINE.multiprocessors),
        other=m * n * (1 / _EXPONENTIALS + 8 / _OPERATIONS) + stored / _SHARED_RATE,
    )
    once = step.seconds(_EXPOSED[built["pingpong"]])
    group = sizes["H"] // sizes["Hk"]
    # Seen from a key, the window's left and right change places.
    seen = sizes | dict(T=sizes["Tk"], Tk=sizes["T"], left=sizes["right"], right=sizes["left"])
    units = []
    for first in range(0, sizes["Tk"], n):
        low, high = visible(seen, first, min(first + n, sizes["Tk"]))
        steps = group * _steps(low, high, m)
        units += [steps * once + 2 * _FINISH_S] * (sizes["B"] * sizes["Hk"])
    return units, step


def _steps(low: int, high: int, size: int) -> int:
    """Returns how many blocks of `size` the range low ... high touches."""
    return 0 if high <= low else -(-high // size) - low // size


def makespan(units: Sequence[float], places: int) -> float:
    """Returns the seconds until the last unit ends. The longest unit goes first, and each goes to
    the place that is free first."""
    free = [0.0] * places
    for unit in sorted(units, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


# ---- GELU MLP


def _mlp(problem: Problem, direction: Direction) -> Iterator[Part]:
    for number, launched in enumerate(products(direction.dry_run(MACHINE).launches)):
        m, k, n = _product_sizes(launched)
        yield product_part(problem, direction, number, (m, n, k))


def product_part(
    problem: Problem, direction: Direction, number: int, sizes: tuple[int, int, int]
) -> Part:
    """Returns one product of a direction, by its number; sizes m, n, k."""
    m, n, k = sizes
    moved = float(problem.dtype.itemsize * (m * k + k * n + m * n))
    name = product_name(direction.name, number, sizes)
    pick = functools.partial(product, number)
    cost = functools.partial(_product_cost, moved)
    return Part(problem, direction, name, pick, cost, 2.0 * m * n * k, moved)


def _product_cost(moved: float, main: Launched, launches: int) -> tuple[float, str]:
    seconds, bound = _or_memory(main.clocks / _CLOCKS_OF_PRODUCTS, "products", moved)
    return seconds + LAUNCH_S, bound


def products(launches: Sequence[Launched]) -> list[Launched]:
    """Returns the launches that compute products."""
    return [launched for launched in launches if " times " in launched.shape]


def product(number: int, launches: Sequence[Launched]) -> Launched:
    """Returns one of `products`, by its number."""
    return products(launches)[number]


def _product_sizes(launched: Launched) -> tuple[int, int, int]:
    match = re.match(r"\((\d+), (\d+)\) times \(\d+, (\d+)\)", launched.shape)
    assert match is not None, launched.shape
    m, k, n = map(int, match.groups())
    return m, k, n


def product_name(direction: str, number: int, sizes: tuple[int, int, int]) -> str:
    """Returns a name such as "forward, product 1 (8192x16384x4096, gelu)", with sizes m, n, k."""
    kind = "plain" if number else {"forward": "gelu", "backward": "gelu'"}[direction]
    return f"{direction}, product {number + 1} ({'x'.join(map(str, sizes))}, {kind})"


# ---- LayerNorm


def _layer_norm(problem: Problem, direction: Direction) -> Iterator[Part]:
    sizes = problem.sizes
    # Forward: x and y, and with a residual also the residual and the sum. Backward: dy, the sum and
    # dx, and with prenorm also the sum's gradient.
    tensors = {"forward": 2 + 2 * sizes["residual"], "backward": 3 + sizes["prenorm"]}
    moved = float(problem.dtype.itemsize * tensors[direction.name] * sizes["rows"] * sizes["cols"])

    def cost(main: Launched, launches: int) -> tuple[float, str]:
        waves = main.waves(MACHINE)
        seconds = moved / COPY_RATE * max(1.0, math.ceil(waves) / waves if waves > 1 else 1.0)
        return seconds + LAUNCH_S * launches, "memory"

    yield Part(problem, direction, direction.name, lambda found: found[0], cost, 0.0, moved)


# ---- the predictions of all ops


def table(rows: Iterable[Prediction]) -> Iterator[str]:
    """Yields the lines of a Markdown table with one row for each prediction."""
    yield "| problem | direction | way (* the rule's) | waves | bound by | predicted | share |"
    yield "| --- | --- | --- | ---: | --- | ---: | ---: |"
    for row in rows:
        way = f"{row.way}{' *' if row.chosen else ''}"
        yield (
            f"| {row.op} {row.problem} | {row.direction} | {way} | {row.waves:.2f} | {row.bound} "
            f"| {1e6 * row.seconds:.0f} us, {_rate(row)} | {100 * row.share:.0f}% |"
        )


def summary(rows: Iterable[Prediction]) -> Iterator[str]:
    """Yields the lines of a Markdown table with one row for each problem and direction: the rule's
    choice, then the others."""
    yield "| problem | the rule's choice | waves | predicted | share | others, share |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    cases: dict[tuple[str, str], list[Prediction]] = {}
    for row in rows:
        cases.setdefault((f"{row.op} {row.problem}", row.direction), []).append(row)
    for (problem, direction), ways in cases.items():
        own = next(row for row in ways if row.chosen)
        others = "; ".join(
            f"{row.way} {100 * row.share:.0f}%"
            for row in sorted(ways, key=lambda row: row.seconds)
            if row is not own
        )
        yield (
            f"| {problem}: {direction} | {own.way} | {own.waves:.2f} "
            f"| {1e6 * own.seconds:.0f} us, {_rate(own)} | {100 * own.share:.0f}% | {others} |"
        )


def _rate(row: Prediction) -> str:
    if row.flops:
        return f"{row.flops / row.seconds / 1e12:.0f} TFLOP/s"
    return f"{row.bytes / row.seconds / 1e12:.2f} TB/s"


BEGIN, END = "<!-- predictions: made by the command below -->", "<!-- end of predictions -->"


def written(text: str, lines: Iterable[str]) -> str:
    """Returns the text with these lines between its marks. Raises ValueError where the text has no
    marks."""
    before, found, rest = text.partition(f"{BEGIN}\n")
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"there is no place for the table: lines {BEGIN!r} and {END!r}")
    body = "\n".join(lines)
    return f"{before}{found}{body}\n{ended}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where nothing can be predicted."""
    parser = argparse.ArgumentParser(
        prog="python -m gptkernels.bench.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="a file with the marks")
    options = parser.parse_args(arguments)
    try:
        rows = list(predictions())
        if options.write is None:
            print("\n".join(table(rows)))
        else:
            text = options.write.read_text()
            options.write.write_text(written(text, summary(rows)))
    except (ImportError, OSError, ValueError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
