"""The demo's folder, with one self-contained page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from gptkernels.bench.case import BASELINE
from gptkernels.bench.report.template import template
from gptkernels.bench.report.words import count, times
from gptkernels.bench.results import write_json
from gptkernels.cli.demo import picture
from gptkernels.cli.demo.beside import Beside
from gptkernels.cli.demo.checks import Checks
from gptkernels.cli.demo.findings import disturbance, findings, machine
from gptkernels.cli.demo.parity import worst_rows
from gptkernels.cli.demo.terminal import Row, of_limit, share, small
from gptkernels.cli.demo.training import PROMPT
from gptkernels.cli.named import grouped
from gptkernels.core.files import replacing

# The page's classes for what is good, bad or neither.
_TONES = {"pass": "good", "fail": "bad", "skipped": "idle", "faster": "good", "slower": "bad"}


def write(
    out: Path,
    content: Row,
    checks: Checks,
    beside: Beside,
    parity_rows: Sequence[Row],
    speed_rows: Sequence[Row],
) -> None:
    """The report folder. The page comes last: where it is, everything else is."""
    records, environment = content["records"], content["environment"]
    with replacing(out / "loss.png") as file:
        file.write_bytes(picture.png(records, beside.curve))
    for name, rows in (("parity", parity_rows), ("speed", speed_rows)):
        write_json(out / f"{name}.json", {"environment": environment, "rows": rows})
    write_json(out / "summary.json", content)
    logged = [record for record in records if record.get("tokens_per_s") is not None]
    page = template(
        "gptkernels.cli.demo",
        "report.html.j2",
        count=count,
        of_limit=of_limit,
        small=small,
        times=times,
    ).render(
        {
            **content,
            "machine": machine(environment),
            "disturbance": disturbance(environment),
            "checks": checks,
            "findings": findings(speed_rows),
            "picture": Markup(picture.svg(records, beside.curve)),
            "beside": beside.sentence,
            "parity": [
                (row, _of_op(row["op"], parity_rows)) for row in worst_rows(parity_rows, ["op"])
            ],
            "timed": [r for r in speed_rows if r["time_s"] is not None and r["impl"] != BASELINE],
            "not_timed": list(grouped(speed_rows, "skipped")),
            "last": logged[-1],
            "rate": _median(logged, "tokens_per_s"),
            "mfu": _median(logged, "mfu"),
            "prompt": PROMPT,
            "tones": _TONES,
        }
    )
    with replacing(out / "report.html") as file:
        file.write_text(page, encoding="utf-8")


def _median(records: Sequence[Row], name: str) -> float | None:
    found = [record[name] for record in records if record[name] is not None]
    return statistics.median(found) if found else None


def _of_op(op: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of one op, the nearest to their limits first."""
    return sorted((row for row in rows if row["op"] == op), key=share, reverse=True)
