"""The page of a report: what the rows say, as words and tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from gptkernels.bench import text
from gptkernels.bench.report import summary, words
from gptkernels.bench.report.picture import Picture
from gptkernels.bench.report.template import template
from gptkernels.bench.results import Row, case_of

# What a row may lack: one that was not timed has little more than its reason.
_OPTIONAL = (
    *("skipped", "failed", "kind", "ratio", "verdict", "best_peer", "peer_ratio"),
    *("peer_spread", "peer_verdict", "peak_bytes", "efficiency"),
)
_VERDICTS = {"faster": "good", "slower": "bad", "same": "soft"}


def html(content: dict[str, Any], drawn: Sequence[tuple[Picture, Mapping[str, bytes]]]) -> str:
    """The page of a results file, with the pictures and their PNGs, light before dark, in it."""
    rows: list[Row] = [{**dict.fromkeys(_OPTIONAL), **row} for row in content["rows"]]
    ceilings = content.get("ceilings") or {}
    facts = _facts(content["environment"])
    best = summary.best_of_ours(rows)
    losing = summary.losing(rows)
    return _template().render(
        machine=facts.get("GPU") or facts.get("CPU", "an unknown machine"),
        facts=facts,
        finished=content["finished"],
        rows=rows,
        best=best,
        beside_plain=[row["verdict"] for row in best if row["ratio"] is not None],
        beside_peers=[row["peer_verdict"] for row in best if row["peer_ratio"] is not None],
        kernels=words.listed(summary.KERNELS),
        means=summary.geometric_means(rows),
        losing=[(row, _rival(row, rows)) for row in losing],
        without_ours=[_without_ours(case) for case in summary.without_ours(rows)],
        failed=summary.grouped(summary.failed(rows), lambda row: (row["impl"], row["skipped"])),
        peers=content.get("peers") or [],
        products=ceilings.get("products") or {},
        memory=ceilings.get("memory") or [],
        pictures=[
            (picture, *(base64.b64encode(png).decode("ascii") for png in pngs.values()))
            for picture, pngs in drawn
        ],
        ops=_by_op(rows),
        skipped=_skipped(rows),
    )


def _facts(environment: dict[str, Any]) -> dict[str, str]:
    """What is needed to repeat the run, by its name."""
    gpu = environment.get("gpu")
    cpu = environment.get("cpu") or {}
    processor = [
        cpu.get("name"),
        words.count(cpu["cores"], "core") if cpu.get("cores") else None,
        cpu.get("instruction_set"),
        f"load {cpu['load']} at the start" if cpu.get("load") is not None else None,
    ]
    facts = {
        "GPU": gpu
        and _joined(
            gpu.get("name"),
            f"{gpu['count']} here" if gpu.get("count", 1) > 1 else None,
            words.size(gpu["memory_bytes"]) if gpu.get("memory_bytes") else None,
            gpu.get("driver") and f"driver {gpu['driver']}",
            gpu.get("cuda") and f"CUDA {gpu['cuda']}",
        ),
        "CPU": _joined(*processor),
        "threads": environment.get("cpu_threads") and f"{environment['cpu_threads']}",
        "system": environment.get("platform"),
        "versions": _joined(
            f"gptkernels {environment.get('gptkernels')}",
            f"Python {environment.get('python')}",
            *(f"{name} {v}" for name, v in (environment.get("versions") or {}).items() if v),
        ),
        "commit": environment.get("commit") or "unknown",
        "command": environment.get("command"),
        "time": environment.get("time"),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _joined(*parts: str | None) -> str:
    return ", ".join(filter(None, parts))


def _rival(row: Row, rows: Sequence[Row]) -> float | None:
    """The time of a row's best peer."""
    case = case_of(row)
    theirs = (r for r in rows if r["impl"] == row["best_peer"] and case_of(r) == case)
    return next((r["time_s"] for r in theirs), None)


def _without_ours(case: list[Row]) -> dict[str, Any]:
    return {**case[0], "ran": [row["impl"] for row in case]}


def _by_op(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """The rows of each op that were timed or failed, case by case."""
    shown = [row for row in rows if row["time_s"] is not None or row["failed"]]
    return {
        op: list(summary.grouped(group, case_of).values())
        for op, group in summary.grouped(shown, lambda row: row["op"]).items()
    }


def _skipped(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Reason -> who was not timed for it, and on how many cases; the commonest reason first."""
    left_out = (row for row in rows if row.get("time_s") is None and not row.get("failed"))
    reasons = summary.grouped(left_out, lambda row: row.get("skipped") or "no reason is known")
    return {
        reason: {name: len(theirs) for name, theirs in summary.grouped(group, _who).items()}
        for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1]))
    }


def _sense(ratio: float) -> str:
    """How a ratio is shown; one that reads 1.00 is neither good nor bad."""
    return "good" if ratio >= 1.005 else "bad" if ratio < 0.995 else "soft"


def _who(row: Row) -> str:
    return f"{row['impl']}, {row['op']}"


def _template() -> jinja2.Template:
    return template(
        "gptkernels.bench.report",
        "page.html.j2",
        count=words.count,
        efficiency=words.efficiency,
        error=words.error,
        flop_rate=text.flop_rate,
        byte_rate=text.byte_rate,
        rate=words.rate,
        size=words.size,
        sense=_sense,
        spread=words.spread,
        times=words.times,
        tone=lambda verdict: _VERDICTS.get(verdict, "soft"),
    )
