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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from gptkernels.cli.demo.report import worst_rows
from gptkernels.cli.demo.terminal import Row, heading, print_reasons, small, table
from gptkernels.core.choice import IMPLEMENTATIONS, unavailable
from gptkernels.truth import verify

# Without a GPU, Triton's kernels run in its interpreter, in a process of their own (it reads the
# variable when it is imported) and for this long at most.
_INTERPRETER_SECONDS = 55.0
_INTERPRETER_ARGUMENTS = ("verify", "--impl", "triton", "--device", "cpu")
_INTERPRETER_COMMAND = "TRITON_INTERPRET=1 gptkernels verify --impl triton"


def parity_table(device: torch.device, console: Console) -> list[Row]:
    """Every op, implementation, dtype and direction, held to the truth in fp64."""
    heading(console, "4. Parity", "errors against the formulas in fp64, beside eager PyTorch's")
    interpret = (
        unavailable("triton", device.type, torch.float32) is not None
        and importlib.util.find_spec("triton") is not None
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(console.status("checking"))
        finish = stack.enter_context(_interpreter()) if interpret else None
        impls = [i for i in IMPLEMENTATIONS if i != "triton" or not interpret]
        rows = [row.as_dict() for row in verify.run(impls, device=device)]
        if finish is not None:
            rows += finish()
    table(
        console,
        {
            "op": lambda r: r["op"],
            "impl": lambda r: r["impl"],
            "dtype": lambda r: r["dtype"],
            "direction": lambda r: r["direction"],
            "error": lambda r: small(r["error"]),
            "PyTorch's": lambda r: small(r["baseline_error"]),
            "": lambda r: f"{r['status']} {r['passed']}/{r['cases']}",
        },
        worst_rows(rows),
    )
    print_reasons(console, (row["reason"] for row in rows))
    return rows


@contextlib.contextmanager
def _interpreter() -> Iterator[Callable[[], list[Row]]]:
    """Start Triton's kernels in the interpreter; yields a function that waits for their rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        process = subprocess.Popen(
            # -P: a package gptkernels in the current folder must not replace the one that runs here
            [
                sys.executable,
                "-P",
                "-m",
                "gptkernels",
                *_INTERPRETER_ARGUMENTS,
                "--json",
                str(path),
            ],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + _INTERPRETER_SECONDS

        def finish() -> list[Row]:
            try:
                _, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
                # It had the time: rows that it did not reach count as failed.
                status = "fail"
                ended = (errors.strip().splitlines() or ["no message"])[-1]
                reason = f"{_INTERPRETER_COMMAND} ended with {process.returncode}: {ended}"
            except subprocess.TimeoutExpired:
                status = "skipped"
                reason = (
                    f"not reached within {_INTERPRETER_SECONDS:.0f} s, "
                    f"run {_INTERPRETER_COMMAND} for all"
                )
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            return rows + _missing_rows(rows, status, reason)

        try:
            yield finish
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


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
