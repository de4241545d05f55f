"""What `gptkernels bench` prints: lines that fit the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gptkernels.bench.regressions import compared
from gptkernels.bench.report.summary import Tally, geometric_means, losing
from gptkernels.bench.results import Row, sameness
from gptkernels.bench.text import byte_rate, figures, flop_rate, size
from gptkernels.cli.named import grouped
from gptkernels.cli.table import Column, fitted

# Columns in order of value, as wide in each case: a narrow terminal loses the last ones.
_COLUMNS = {"time": 8, "spread": 6, "PyTorch": 8, "best": 7, "rate": 16, "ceiling": 7, "error": 6,
            "memory": 8, "host": 8}  # fmt: skip
# Of the geometric means.
_MEANS = (Column(""), Column("plain PyTorch"), Column("best of all others"))


def head(content: dict[str, Any]) -> Iterator[str]:
    """The machine, what it was measured to do, and the peers."""
    here, gpu = content["environment"], content["environment"]["gpu"]
    versions = [f"{name} {version}" for name, version in here["versions"].items() if version]
    commit = f" at {here['commit']}" if here["commit"] else ""
    yield f"gptkernels {here['gptkernels']}{commit}, {', '.join(versions)}"
    cpu = here["cpu"]
    kernels = f", CPU kernels for {cpu['instruction_set']}" if cpu["instruction_set"] else ""
    yield f"{cpu['name']}, {here['cpu_threads']} threads, load {cpu['load']}{kernels}"
    if gpu is not None:
        yield f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    yield f"Ceilings: {'; '.join(_ceilings(content['ceilings']))}"
    here_are = [peer for peer in content["peers"] if peer["status"] == "here"]
    own = [peer["name"] for peer in here_are if peer["package"] == "torch"]
    more = [f"{p['name']} {p['version'] or ''}".strip() for p in here_are if p["name"] not in own]
    yield f"Peers: PyTorch's {', '.join([*own, *more])}"
    absent = [peer["name"] for peer in content["peers"] if peer["status"] == "absent"]
    if absent:
        yield f"Not installed: {', '.join(absent)}"
    for peer in content["peers"]:
        if peer["status"] == "broken":
            yield f"BROKEN: {peer['name']} is installed, and does not import: {peer['reason']}"


def _ceilings(found: dict[str, Any]) -> Iterator[str]:
    for dtype, rate in found["products"].items():
        yield f"products {dtype} {flop_rate(rate)}"
    rates = [f"{byte_rate(rate)} in {size(count)}" for count, rate in found["memory"]]
    if rates:
        yield f"memory {', '.join(rates)}"


def case(rows: Sequence[Row], width: int | None) -> Iterator[str]:
    """One case: what it is, a line for each candidate that ran, at most `width` columns wide."""
    first = rows[0]
    yield f"{first['op']} {first['shape']} {first['dtype']} {first['direction']}"
    timed = sorted((r for r in rows if r["time_s"] is not None), key=lambda r: r["time_s"])
    cells = {row["impl"]: figures(row) for row in timed}
    titles = [title for title in _COLUMNS if any(title in found for found in cells.values())]
    columns = [
        Column(""),
        *(
            Column(title, _COLUMNS[title], right=True, lost=len(_COLUMNS) - place)
            for place, title in enumerate(titles)
        ),
    ]
    lines = [(name, *(found.get(title, "") for title in titles)) for name, found in cells.items()]
    layout = fitted(columns, lines, width, indent="  ")
    if timed:
        yield from layout.head()
    for line in lines:
        yield from layout.lines(line)
    for row in rows:
        if row.get("wrong"):
            yield f"  {row['impl']} computes something else: its error is far beyond the limit"
        if row.get("failed"):
            yield f"  {row['impl']}: FAILED: {row['skipped']}"


def foot(rows: Sequence[Row], width: int | None) -> Iterator[str]:
    """What was skipped and why, geometric means, and what is slower than a peer."""
    skipped = [row for row in rows if row["time_s"] is None and not row.get("failed")]
    if skipped:
        yield "\nNot run:"
        yield from (f"  {line}" for line in grouped(skipped, "skipped"))
    means = geometric_means(rows)
    if means:
        yield "\nHow many times as fast our best kernel is (geometric mean; won-even-lost):"
        found = [
            (f"{m.op} {m.dtype} {m.direction}", _tally(m.pytorch), _tally(m.peer)) for m in means
        ]
        layout = fitted(_MEANS, found, width, indent="  ")
        yield from layout.head()
        for line in found:
            yield from layout.lines(line)
    slower = losing(rows)
    if slower:
        cases = f"{len(slower)} case{'' if len(slower) == 1 else 's'}"
        yield f"\nSlower than a peer, beyond the spread, in {cases}:"
    for row in slower:
        what = f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}"
        yield f"  {row['peer_ratio']:.2f}x {row['best_peer']}: {what} ({row['impl']})"


def _tally(tally: Tally | None) -> str:
    if tally is None:
        return "-"
    return f"{tally.mean:.2f}x ({tally.faster}-{tally.same}-{tally.slower})"


def regressions(
    before: dict[str, Any], now: dict[str, Any], slower: Sequence[Row]
) -> Iterator[str]:
    """What became slower than in an older file."""
    yield ""
    here, there = sameness(now), sameness(before)
    for name in ("processor", "cpu_threads", "versions", "gpu", "platform"):
        if here.get(name) != there.get(name):
            other = f"{there.get(name)}, here {here.get(name)}"
            yield f"The older file is of another {name.replace('_', ' ')}: {other}"
    count = compared(before["rows"], now["rows"])
    yield f"Beside the older file: {count} rows in both, {len(slower)} slower"
    for row in slower:
        what = f"{row['op']} {row['shape']} {row['dtype']} {row['direction']} {row['impl']}"
        if row["time_s"] is None:
            yield f"  no longer runs: {what}: {row['skipped']}"
        else:
            known = f"known to {100 * row['within']:.0f}%"
            yield f"  {100 * (row['change'] - 1):.0f}% slower ({known}): {what}"
