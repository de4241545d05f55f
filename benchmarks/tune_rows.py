"""The rows of a tuning run: kept in a file, printed as lines, shown in a table."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptkernels.bench.report import Row, commit, seconds
from gptkernels.core import native

# Statuses of rows that another run does again.
_UNFINISHED = ("started", "unfinished")


class Rows:
    """The rows of a file, one a line, of which those count that are about these kernels here."""

    def __init__(self, path: Path, here: dict[str, Any]) -> None:
        self.path, self.here = path, here
        self.found: dict[tuple[str, ...], Row] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a run that was stopped
                    continue
                if _about(row, here):
                    self.found[_key(row)] = row

    def add(self, **row: Any) -> Row:
        """Writes a row, which replaces one of the same name."""
        full = {"time": now(), **self.here, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # On a line of its own, also after a line that was cut short.
        with open(self.path, "a+b") as file:
            end = file.seek(0, 2)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(full).encode() + b"\n")
        self.found[_key(full)] = full
        return full

    def get(self, *key: str) -> Row | None:
        """The row called so, unless it was never finished."""
        row = self.found.get(key)
        return None if row is None or row["status"] in _UNFINISHED else row

    def started(self) -> list[Row]:
        """Rows at which a process ended."""
        return [row for row in self.found.values() if row["status"] == "started"]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in ("op", "problem", "direction", "way"))


def _about(row: Row, here: dict[str, Any]) -> bool:
    """The same GPU and the same kernels: by the extension's content, or by a commit without
    changes."""
    if row.get("gpu") != here["gpu"]:
        return False
    unchanged = here["commit"] and not here["commit"].endswith("+changes")
    return row.get("build") == here["build"] or bool(
        unchanged and row.get("commit") == here["commit"]
    )


def now() -> str:
    """The time in UTC, as rows have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def here(device: torch.device) -> dict[str, Any]:
    """What rows are about: the GPU, the commit, and the extension by its content."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    build = hashlib.sha256(Path(native.dry_run_module().__file__).read_bytes()).hexdigest()[:12]
    return {"gpu": gpu, "commit": commit(), "build": build}


def best_peer(op: str, problem: str, direction: str, rows: Rows) -> str | None:
    """The name of the fastest that ran; None where none did."""
    ran = [
        row
        for key, row in rows.found.items()
        if key[:3] == (op, problem, direction)
        and row["kind"] == "peer"
        and row["status"] == "timed"
    ]
    return min(ran, key=lambda row: row["time_s"])["way"] if ran else None


def say(row: Row) -> None:
    """Prints a row as one line."""
    said = f"{row['op']} {row['problem']} {row['direction']}: {row['way']}: {row['status']}"
    if row["status"] == "timed":
        said += f" {seconds(row['time_s'])}, {_rate(row)}, {100 * row['share']:.0f}%"
        if row.get("ratio"):
            said += f", {row['ratio']:.2f}x {row['peer']}"
    if row.get("reason"):
        said += f" ({row['reason']})"
    print(said, flush=True)


def _rate(row: Row) -> str:
    if row["flops"]:
        return f"{row['rate'] / 1e12:.0f} TFLOP/s"
    return f"{row['rate'] / 1e9:.0f} GB/s"


def table(rows: Rows) -> Iterator[str]:
    """Markdown: of each case the best of our kernels, beside the best peer."""
    yield "| case | best of ours | measured | predicted | share | beside the best peer | error |"
    yield "| --- | --- | ---: | ---: | ---: | --- | --- |"
    for name in dict.fromkeys(key[:3] for key in rows.found if key[0] != "ceiling"):
        # A problem whose inputs did not fit has a row, though it has no cases.
        ours = [row for key, row in rows.found.items() if key[:3] == name and row["kind"] != "peer"]
        timed = [row for row in ours if row["status"] == "timed"]
        case = " ".join(filter(None, name))
        if not timed:
            statuses = ", ".join(sorted({row["status"] for row in ours})) or "not tried"
            yield f"| {case} | none: {statuses} | | | | | |"
            continue
        # The ratio is compared first, because it comes from calls that alternated.
        best = max(timed, key=lambda row: (row.get("ratio") or 0.0, -row["time_s"]))
        chosen = " (the rule's)" if best["chosen"] else ""
        peer = f"{best['ratio']:.2f}x {best['peer']}" if best.get("ratio") else "no peer ran"
        predicted = seconds(best["predicted_s"])
        yield (
            f"| {case} | {best['way']}{chosen} | {seconds(best['time_s'])}, {_rate(best)} "
            f"| {predicted} | {100 * best['share']:.0f}% | {peer} "
            f"| {best['error']:.1e} of {best['limit']:.1e} |"
        )
