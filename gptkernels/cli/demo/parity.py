"""The demo's parity table, Triton's rows in an interpreter of their own where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    heading(console, "5. Parity", "errors against the formulas in fp64, beside eager PyTorch's")
    interpret = (
        unavailable("triton", device.type, torch.float32) is not None
        and importlib.util.find_spec("triton") is not None
    )
    with console.status("checking"), ThreadPoolExecutor() as pool:
        interpreted = pool.submit(interpreter_rows) if interpret else None
        impls = [i for i in IMPLEMENTATIONS if i != "triton" or not interpret]
        rows = [row.as_dict() for row in verify.run(impls, device=device)]
        if interpreted is not None:
            rows += interpreted.result()
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


def interpreter_rows() -> list[Row]:
    """The rows of Triton's kernels in the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        # -P: a package gptkernels in the current folder must not replace the one that runs here
        program = [sys.executable, "-P", "-m", "gptkernels"]
        try:
            done = subprocess.run(
                [*program, *_INTERPRETER_ARGUMENTS, f"--json={path}"],
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=_INTERPRETER_SECONDS,
                check=False,
            )
            # It had the time: rows that it did not reach count as failed.
            status = "fail"
            ended = (done.stderr.strip().splitlines() or ["no message"])[-1]
            reason = f"{_INTERPRETER_COMMAND} ended with {done.returncode}: {ended}"
        except subprocess.TimeoutExpired:
            status = "skipped"
            reason = (
                f"not reached within {_INTERPRETER_SECONDS:.0f} s, "
                f"run {_INTERPRETER_COMMAND} for all"
            )
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return rows + _missing_rows(rows, status, reason)


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
