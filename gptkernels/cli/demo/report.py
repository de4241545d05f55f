"""The demo's folder, with one self-contained page."""

from __future__ import annotations

import base64
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jinja2

from gptkernels import bench
from gptkernels.bench.results import write_json
from gptkernels.bench.text import seconds
from gptkernels.cli.demo.terminal import Row, reasons, small
from gptkernels.core.files import replacing


def worst_rows(rows: Iterable[Row]) -> list[Row]:
    """One row for each op, implementation, dtype and direction: of its cases the one that comes
    closest to its limit, with how many `cases` there are, how many `passed`, and one `status`.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "impl", "dtype", "direction"))
        groups.setdefault(key, []).append(row)
    order = {op: i for i, op in enumerate(bench.OPERATORS)}
    worst = []
    for key in sorted(groups, key=lambda key: (order.get(key[0], len(order)), key[1] != "torch")):
        group = groups[key]
        statuses = [row["status"] for row in group]
        measured = [row for row in group if row["limit"]]
        closest = max(measured, key=lambda r: r["error"] / r["limit"], default=group[0])
        status = next((s for s in ("fail", "pass", "skipped") if s in statuses), "skipped")
        worst.append(
            {
                **closest,
                "status": status,
                "cases": len(group),
                "passed": statuses.count("pass"),
                "reason": "; ".join(reasons(row["reason"] for row in group)),
            }
        )
    return worst


def write(
    out: Path, content: Row, prompt: str, parity_rows: list[Row], speed_rows: list[Row]
) -> None:
    """The report folder. The page comes last: where it is, everything else is."""
    picture = (out / "training" / "loss.png").read_bytes()
    logged = content["records"][1:]  # the first is the validation before training
    with replacing(out / "loss.png") as file:
        file.write_bytes(picture)
    environment = content["environment"]
    for name, rows in (("parity", parity_rows), ("speed", speed_rows)):
        write_json(out / f"{name}.json", {"environment": environment, "rows": rows})
    write_json(out / "summary.json", content)
    page = _template().render(
        **content,
        picture=base64.b64encode(picture).decode("ascii"),
        parity=worst_rows(parity_rows),
        parity_all=parity_rows,
        notes=Counter(row["reason"] for row in parity_rows if row["reason"]),
        speed=speed_rows,
        not_timed=reasons(f"{r['impl']}: {r['skipped']}" for r in speed_rows if "skipped" in r),
        last=logged[-1],
        rate=statistics.median(record["tokens_per_s"] for record in logged),
        mfu=None if logged[-1]["mfu"] is None else statistics.median(r["mfu"] for r in logged),
        prompt=prompt,
    )
    with replacing(out / "report.html") as file:
        file.write_text(page, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gptkernels.cli.demo", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(small=small, seconds=seconds)
    return environment.get_template("report.html.j2")
