"""The rows of a tuning run: kept in a file, printed as lines, shown in a table."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import gptkernels
from gptkernels.bench.environment import commit
from gptkernels.bench.peers import packages
from gptkernels.bench.results import Row
from gptkernels.bench.text import seconds
from gptkernels.core import native

NO_MEMORY = "out of memory"
# Statuses of rows that another run does again.
_UNFINISHED = ("started", "unfinished", NO_MEMORY)


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
                if _counts(row, here):
                    self.found[_key(row)] = row

    def add(self, **row: Any) -> Row:
        """Writes a row, which replaces one of the same name."""
        about = self.here["about"][row.get("impl", "others")]
        full = {"time": now(), **self.here, "about": about, **row}
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


def _counts(row: Row, here: dict[str, Any]) -> bool:
    """Whether a row is about what is here: the same GPU and the same kernels; the extension also by
    a commit without changes."""
    if row.get("gpu") != here["gpu"]:
        return False
    impl = row.get("impl", "others")
    if row.get("about") == here["about"][impl]:
        return True
    unchanged = here["commit"] and not here["commit"].endswith("+changes")
    return bool(impl == "cuda" and unchanged and row.get("commit") == here["commit"])


def now() -> str:
    """The time in UTC, as rows have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def here(device: torch.device) -> dict[str, Any]:
    """What rows are about: the GPU, the commit, and by implementation what runs: the extension by
    its content, Triton's kernels by version and source, others by the versions of PyTorch and of
    the peers' packages."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    about = {
        "cuda": _extension(device),
        "triton": _triton(),
        "others": _peers(),
    }
    return {"gpu": gpu, "commit": commit(), "about": about}


def _extension(device: torch.device) -> str | None:
    if native.unavailable(device.type) is not None:
        return None
    return f"extension {_hash([Path(native.module().__file__)])}"


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    version = importlib.import_module("triton").__version__
    package = Path(gptkernels.__file__).parent
    patterns = ("core/triton_*.py", "ops/*/triton.py", "ops/*/triton/*.py")
    found = [path for pattern in patterns for path in sorted(package.glob(pattern))]
    return f"Triton {version}, kernels {_hash(found)}"


def _peers() -> str:
    """Also whether a package imports, which another package may have changed."""
    versions = {
        f"{peer['package']} {peer['version']} {peer['status']}"
        for peer in packages.found()
        if peer["status"] != "absent"
    }
    return ", ".join(sorted(versions))


def _hash(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def best_peer(
    op: str, problem: str, direction: str, among: Collection[str], rows: Rows
) -> str | None:
    """The name of the fastest of them that ran; None where none did."""
    ran = [
        row
        for key, row in rows.found.items()
        if key[:3] == (op, problem, direction)
        and row["kind"] == "peer"
        and row["status"] == "timed"
        and row["way"] in among
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
    """Markdown: of each case the best of our kernels in each implementation, beside the best
    peer."""
    yield "| case | | best of ours | measured | predicted | share | beside the best peer | error |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- | --- |"
    # A problem whose inputs did not fit has a row, though it has no cases; a case of which nothing
    # was tried has peers' rows alone.
    ours: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for key, row in rows.found.items():
        if row["kind"] != "ceiling":
            by_impl = ours.setdefault(key[:3], {})
            if row["kind"] != "peer":
                by_impl.setdefault(row.get("impl", ""), []).append(row)
    for name, by_impl in ours.items():
        for impl, found in by_impl.items() or {"": []}.items():
            yield _line(" ".join(filter(None, name)), impl, found)


def _line(case: str, impl: str, ours: list[Row]) -> str:
    timed = [row for row in ours if row["status"] == "timed"]
    if not timed:
        statuses = ", ".join(sorted({row["status"] for row in ours})) or "not tried"
        return f"| {case} | {impl} | none: {statuses} | | | | | |"
    # The ratio is compared first, because it comes from calls that alternated.
    best = max(timed, key=lambda row: (row.get("ratio") or 0.0, -row["time_s"]))
    chosen = " (the rule's)" if best["chosen"] else ""
    peer = f"{best['ratio']:.2f}x {best['peer']}" if best.get("ratio") else "no peer ran"
    return (
        f"| {case} | {impl} | {best['way']}{chosen} | {seconds(best['time_s'])}, {_rate(best)} "
        f"| {seconds(best['predicted_s'])} | {100 * best['share']:.0f}% | {peer} "
        f"| {best['error']:.1e} of {best['limit']:.1e} |"
    )
