"""What a measurement carries and how it is kept: environment, JSON files, tables and plots.

A figure without its GPU, driver, versions, commit and command cannot be repeated, so every results
file opens with them.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptkernels.core import cpu
from gptkernels.core.figure import figure_class
from gptkernels.core.files import make_folder, replacing

Row = dict[str, Any]

_VERSIONS_OF = ("torch", "triton", "numpy", "transformers")


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """The machine and the software that a figure was measured on.

    Keys: time (UTC), command, commit, gptkernels, python, platform, cpu (name, cores that this
    process may use, the load when it asked, and the instruction set of the CPU kernels, None
    without them), cpu_threads, versions (of PyTorch and friends), and gpu (name, driver, CUDA
    runtime, memory, multiprocessors), None without one.
    """
    import gptkernels

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(_command() if command is None else command),
        "commit": commit(),
        "gptkernels": gptkernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in _VERSIONS_OF},
        "gpu": _gpu(),
    }


def commit() -> str | None:
    """The source's commit, with "+changes" when files differ from it.

    The variable GPTKERNELS_COMMIT stands in where the source was copied without its history; None
    where neither is known.
    """
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        head = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
        if head and _output(["git", "-C", str(folder), "ls-files", ":/gptkernels/__init__.py"]):
            changed = _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
            return head + ("+changes" if changed else "")
    return os.environ.get("GPTKERNELS_COMMIT") or None


def write_json(path: Path | str, content: Any) -> None:
    """Writes `content` as JSON; a reader sees the old file or the new one, never half of one.

    Parent folders are made. Raises OSError when the file cannot be written.
    """
    path = Path(path)
    make_folder(f"the parent of {path}", path.parent)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def recorded(
    rows: Iterable[Row], path: Path | str | None, command: Sequence[str] | None = None
) -> Iterator[Row]:
    """Passes rows through and writes all so far, with the environment, to `path` after each one;
    without a path it only passes them through.

    A run that is cut short thus leaves a complete file of the rows it had; its "finished" is false.
    """
    if path is None:
        yield from rows
        return
    content: dict[str, Any] = {"environment": environment(command), "finished": False, "rows": []}
    write_json(path, content)
    for row in rows:
        content["rows"].append(row)
        write_json(path, content)
        yield row
    content["finished"] = True
    write_json(path, content)


def figures(row: Row) -> dict[str, str]:
    """A benchmark row as short readable cells."""
    if row["time_s"] is None:
        return {"time": f"skipped: {row['skipped']}"}
    cells = {"time": seconds(row["time_s"])}
    if row.get("host_s") is not None:
        cells["host"] = seconds(row["host_s"])
    if row.get("high_s") is not None:
        cells["spread"] = f"{50 * (row['high_s'] - row['low_s']) / row['time_s']:.0f}%"
    if row.get("ratio") is not None:
        cells["vs pytorch"] = f"{row['ratio']:.2f}x"
    if row.get("bytes_per_s") is not None:
        cells["GB/s"] = f"{row['bytes_per_s'] / 1e9:.1f}"
    if row.get("flops_per_s") is not None:
        cells["GFLOP/s"] = f"{row['flops_per_s'] / 1e9:,.0f}"
    if row.get("floor_share") is not None:
        cells["floor"] = f"{100 * row['floor_share']:.0f}%"
    return cells


def seconds(value: float | None) -> str:
    """A duration with three digits and a fitting unit; "-" where there is none."""
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def check_plot(path: Path | str) -> None:
    """Finds before a measurement what would keep `plot` from drawing after it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the suffix of `path` is neither .png nor .svg.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a plot is written as .png or .svg, got {str(path)!r}")
    try:
        figure_class()
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is missing: pip install 'gptkernels[bench]'"
        ) from error


def plot(rows: Sequence[Row], path: Path | str) -> None:
    """Draws each implementation's speed beside plain PyTorch's as a PNG or SVG.

    Args:
        rows: rows of `timing.rows`; those without a time or a ratio are left out.
        path: the file to write; its suffix decides the format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no row has a ratio to draw, or the suffix is neither .png nor .svg.
    """
    check_plot(path)
    drawn = [row for row in rows if row.get("ratio") is not None]
    if not drawn:
        raise ValueError("rows has no measured ratio, so there is nothing to draw")
    labels = [f"{r['op']} {r['shape']} {r['dtype']} {r['direction']} [{r['impl']}]" for r in drawn]
    figure = figure_class()(figsize=(9, 1 + 0.28 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.barh(labels, [row["ratio"] for row in drawn])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("speed against plain PyTorch (1 = as fast, more is faster)")
    path = Path(path)
    make_folder(f"the parent of {path}", path.parent)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())


def _command() -> list[str]:
    """This process's command line, without the folders of this machine's programs."""
    program, *rest = sys.orig_argv
    if rest and Path(rest[0]).name == "gptkernels":
        return ["gptkernels", *rest[1:]]
    return [Path(program).name, *rest]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "instruction_set": None if cpu.unavailable("cpu") else cpu.instruction_set(),
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "count": torch.cuda.device_count(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
