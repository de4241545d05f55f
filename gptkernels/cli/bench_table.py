"""What `gptkernels bench` prints: lines that fit the terminal."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from gptkernels.bench.regressions import compared
from gptkernels.bench.report.summary import Tally, geometric_means, losing
from gptkernels.bench.results import Row, sameness
from gptkernels.bench.text import byte_rate, figures, flop_rate, size

# Columns in order of value: a narrow terminal loses the last ones.
_COLUMNS = {"time": 8, "spread": 6, "PyTorch": 8, "best": 7, "rate": 16, "ceiling": 7, "error": 6,
            "memory": 8, "host": 8}  # fmt: skip


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


def case(rows: Sequence[Row], width: int) -> Iterator[str]:
    """One case: what it is, a line for each candidate that ran."""
    first = rows[0]
    yield f"{first['op']} {first['shape']} {first['dtype']} {first['direction']}"
    timed = sorted((r for r in rows if r["time_s"] is not None), key=lambda r: r["time_s"])
    cells = {row["impl"]: figures(row) for row in timed}
    longest = max(map(len, cells), default=0)
    titles = list(_fitting({title for found in cells.values() for title in found}, width - longest))
    if timed:
        yield _line("", longest, titles, {title: title for title in titles})
    for name, found in cells.items():
        yield _line(name, longest, titles, found)
    for row in rows:
        if row.get("wrong"):
            yield f"  {row['impl']} computes something else: its error is far beyond the limit"
        if row.get("failed"):
            yield f"  {row['impl']}: FAILED: {row['skipped']}"


def _fitting(wanted: Container[str], width: int) -> Iterator[str]:
    """The wanted columns, as many as that width has room for."""
    taken = 2
    for title, wide in _COLUMNS.items():
        if title not in wanted:
            continue
        taken += 1 + wide
        if taken > width:
            return
        yield title


def _line(name: str, longest: int, titles: Sequence[str], cells: dict[str, str]) -> str:
    found = (f"{cells.get(title, ''):>{_COLUMNS[title]}}" for title in titles)
    return f"  {name:<{longest}} {' '.join(found)}".rstrip()


def foot(rows: Sequence[Row]) -> Iterator[str]:
    """What was skipped and why, geometric means, and what is slower than a peer."""
    reasons: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["time_s"] is None and not row.get("failed"):
            names = reasons.setdefault(row["skipped"], {})
            names[row["impl"]] = names.get(row["impl"], 0) + 1
    if reasons:
        yield "\nNot run:"
    for reason, names in reasons.items():
        yield f"  {', '.join(f'{name} ({count}x)' for name, count in names.items())}: {reason}"
    means = geometric_means(rows)
    if means:
        yield "\nHow many times as fast our best kernel is (geometric mean; won-even-lost):"
        yield f"  {'':<44} {'plain PyTorch':<22} the best of all others"
    for mean in means:
        what = f"{mean.op} {mean.dtype} {mean.direction}"
        yield f"  {what:<44} {_tally(mean.pytorch):<22} {_tally(mean.peer)}"
    slower = losing(rows)
    if slower:
        yield f"\nSlower than a peer, beyond the spread, in {len(slower)} cases:"
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
