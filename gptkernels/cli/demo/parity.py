"""The demo's parity table, Triton's rows in an interpreter of their own where there is no GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from gptkernels import bench
from gptkernels.bench.report.summary import grouped
from gptkernels.cli.console import STYLES, print_text
from gptkernels.cli.demo.terminal import Row, heading, of_limit, share, small
from gptkernels.cli.table import Column, print_table
from gptkernels.core.choice import IMPLEMENTATIONS, unavailable
from gptkernels.truth import verify

# Without a GPU, Triton's kernels run in its interpreter, in a process of their own (it reads the
# variable when it is imported) and for this long at most.
_INTERPRETER_SECONDS = 55.0
_INTERPRETER_ARGUMENTS = ("verify", "--impl", "triton", "--device", "cpu")
_INTERPRETER_COMMAND = "TRITON_INTERPRET=1 gptkernels verify --impl triton"

_COLUMNS = (
    Column("op"),
    Column("impl"),
    Column("passed", right=True),
    Column("nearest to its limit", lost=2),
    Column("error", right=True, lost=3),
    Column("PyTorch's", right=True, lost=1),
    Column("of limit", right=True),
)


def parity_table(device: torch.device, console: Console) -> list[Row]:
    """Every op, implementation, dtype and direction, held to the truth in fp64."""
    heading(
        console,
        "6. Parity",
        "Each op against its formula in fp64, beside eager PyTorch. Of each implementation the "
        "check that comes nearest to its limit.",
    )
    interpret = (
        unavailable("triton", device.type, torch.float32) is not None
        and importlib.util.find_spec("triton") is not None
    )
    impls = [i for i in IMPLEMENTATIONS if i != "triton" or not interpret]
    beside = interpreter() if interpret else contextlib.nullcontext(list[Row])
    with console.status("checking"), beside as interpreted:
        rows = [row.as_dict() for row in verify.run(impls, device=device)]
        rows += interpreted()
    shown = [row for row in worst_rows(rows, ("op", "impl")) if row["status"] != "skipped"]
    print_table(
        console,
        _COLUMNS,
        [
            (
                row["op"],
                row["impl"],
                f"{row['passed']} of {row['ran']}",
                f"{row['dtype']} {row['direction']}",
                small(row["error"]),
                small(row["baseline_error"]),
                of_limit(row),
            )
            for row in shown
        ],
        [STYLES[row["status"]] for row in shown],
    )
    for row in rows:
        if row["status"] == "fail":
            print_text(console, f"FAILED: {_failure(row)}", STYLES["fail"])
    return rows


def _failure(row: Row) -> str:
    what = f"{row['op']} {row['case']}, {row['impl']} {row['dtype']} {row['direction']}"
    return f"{what}: " + (
        row["reason"]
        or f"the error of {row['tensor']} is {small(row['error'])}, its limit {small(row['limit'])}"
    )


def worst_rows(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """One row for each group of rows with the same values of `names`: the one that comes closest to
    its limit, with how many were `skipped`, how many `ran` and `passed`, and one `status`.
    """
    order = {op: i for i, op in enumerate(bench.OPERATORS)}
    groups = grouped(rows, lambda row: tuple(row[name] for name in names)).values()
    worst: list[Row] = []
    for group in sorted(groups, key=lambda g: order.get(g[0]["op"], len(order))):
        closest: Row = max(group, key=share)
        statuses = [row["status"] for row in group]
        skipped, passed = statuses.count("skipped"), statuses.count("pass")
        status = next((s for s in ("fail", "pass", "skipped") if s in statuses), "skipped")
        counts = {"skipped": skipped, "ran": len(group) - skipped, "passed": passed}
        worst.append({**closest, **counts, "status": status})
    return worst


def interpreter_rows() -> list[Row]:
    """The rows of Triton's kernels in the interpreter."""
    with interpreter() as rows:
        return rows()


@contextlib.contextmanager
def interpreter() -> Iterator[Callable[[], list[Row]]]:
    """Starts the interpreter's process, which ends with this context at the latest, and yields what
    waits for its rows."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "rows.json", Path(folder) / "stderr.txt"
        # -P: a package gptkernels in the current folder must not replace the one that runs here
        program = [sys.executable, "-P", "-m", "gptkernels"]
        with said.open("wb") as errors:
            process = subprocess.Popen(
                [*program, *_INTERPRETER_ARGUMENTS, f"--json={path}"],
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

        def wait() -> list[Row]:
            try:
                code = process.wait(max(0.0, started + _INTERPRETER_SECONDS - time.monotonic()))
                # It had the time: rows that it did not reach count as failed.
                status = "fail"
                lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                ended = (lines or ["no message"])[-1]
                reason = f"{_INTERPRETER_COMMAND} ended with {code}: {ended}"
            except subprocess.TimeoutExpired:
                process.kill()  # what it has written by now is what is read
                process.wait()
                status = "skipped"
                reason = (
                    f"not reached within {_INTERPRETER_SECONDS:.0f} s, "
                    f"run {_INTERPRETER_COMMAND} for all"
                )
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            return rows + _missing_rows(rows, status, reason)

        try:
            yield wait
        finally:
            process.kill()
            process.wait()


def _missing_rows(rows: list[Row], status: str, reason: str) -> list[Row]:
    """Rows for what the interpreter should have measured and did not."""
    names = ("op", "case", "dtype", "direction")
    there = {tuple(row[name] for name in names) for row in rows}
    return [
        verify.Row(case.op, case.name, "triton", dtype, direction, status, reason=reason).as_dict()
        for case in verify.CASES
        for dtype in map(verify.dtype_name, verify.DTYPES)
        for direction in case.directions
        if (case.op, case.name, dtype, direction) not in there
    ]
