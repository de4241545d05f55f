"""What the demo's times say: what is faster here, what is slower, and why, in sentences that are
made of the measured rows alone.

The reason is the share of what this machine was measured to reach: of the time that memory or
matrix products alone would take. Where both candidates take many times as long, something else
decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptkernels.bench.case import BASELINE
from gptkernels.bench.report.summary import best_of_ours, grouped
from gptkernels.bench.report.words import count, listed, times
from gptkernels.bench.results import Row, case_of
from gptkernels.bench.text import seconds, size

_BUSY = 0.8  # of the cores
_NEITHER = 0.15  # of a ceiling: it limits neither candidate
_MORE = 1.5  # times the memory: worth a word
_CEILINGS = {"memory": "Memory", "arithmetic": "Matrix products"}


@dataclass(frozen=True)
class Finding:
    """A sentence or two about an operator; `verdict` is "faster", "slower" or "same"."""

    verdict: str
    op: str
    text: str


def findings(rows: Sequence[Row]) -> list[Finding]:
    """What is faster first, then what is slower, then what is neither beyond the spread.

    rows: those of `bench.measure`, with the ones of plain PyTorch.
    """
    plain = {case_of(row): row for row in rows if row["impl"] == BASELINE}
    best = [row for row in best_of_ours(rows) if row["ratio"] is not None]
    return [
        Finding(verdict, op, "".join(_sentences(verdict, group, best, plain)))
        for verdict in ("faster", "slower", "same")
        for op, group in grouped(
            (row for row in best if row["verdict"] == verdict), lambda row: row["op"]
        ).items()
    ]


def machine(environment: dict[str, Any]) -> str:
    """Where the times were taken."""
    cpu, gpu = environment["cpu"], environment["gpu"]
    kernels = f", CPU kernels for {cpu['instruction_set']}" if cpu["instruction_set"] else ""
    threads = count(environment["cpu_threads"], "thread")
    return str(gpu["name"]) if gpu else f"{cpu['name']}, {threads}{kernels}"


def disturbance(environment: dict[str, Any]) -> str:
    """What to say of times that others' programs disturbed; nothing where none did."""
    load, cores = environment["cpu"]["load"], environment["cpu"]["cores"] or 1
    if load is None or load <= environment["cpu_threads"] + _BUSY * cores:
        return ""
    return (
        f"Other programs kept the machine busy (load {load:.1f}, {count(cores, 'core')}): on an "
        "idle one the times are others."
    )


def _sentences(
    verdict: str, group: list[Row], best: list[Row], plain: dict[Any, Row]
) -> Iterator[str]:
    of = count(sum(row["op"] == group[0]["op"] for row in best), "case")
    impls = listed([f"impl={impl!r}" for impl in dict.fromkeys(row["impl"] for row in group)])
    if verdict == "same":
        yield f"shows no difference beyond the spread of the measurement in {len(group)} of {of}"
        yield f" ({impls}): {_range(group)}."
        return
    yield f"is {verdict} in {len(group)} of {of} ({impls})"
    far = (max if verdict == "faster" else min)(group, key=lambda row: row["ratio"])
    other = plain[case_of(far)]
    yield f", {_range(group)}. The furthest is" if len(group) > 1 else ":"
    yield f" {times(far['ratio'])} in {far['dtype']} {far['direction']}, {far['shape']}: "
    yield f"{seconds(far['time_s'])} beside {seconds(other['time_s'])}."
    yield from _why(far, other)


def _range(group: list[Row]) -> str:
    ratios = [row["ratio"] for row in group]
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


def _why(ours: Row, plain: Row) -> Iterator[str]:
    mine, theirs = ours["efficiency"], plain["efficiency"]
    if mine is not None and theirs is not None:
        yield (
            f" {_CEILINGS[ours['bound']]} alone would take {seconds(ours['floor_s'])}, of whose "
            f"speed ours reaches {_percent(mine)} and PyTorch {_percent(theirs)}"
        )
        decides = max(mine, theirs) < _NEITHER
        yield ": other arithmetic and the cost of calls decide." if decides else "."
    most, least = ours.get("peak_bytes"), plain.get("peak_bytes")
    if most and least and max(most, least) >= _MORE * min(most, least):
        yield f" A call of ours takes {size(most)} of memory, PyTorch's {size(least)}."
    if ours["best_peer"] not in (None, BASELINE):
        yield f" Beside the best other, {ours['best_peer']}, it is {times(ours['peer_ratio'])}."
