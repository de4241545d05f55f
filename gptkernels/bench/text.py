"""Numbers of a benchmark, and its rows, as short words."""

from __future__ import annotations

from collections.abc import Sequence

from gptkernels.bench.measure import spread
from gptkernels.bench.results import Row

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_FLOPS = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))
_BYTES_PER_S = ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"))
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def figures(row: Row) -> dict[str, str]:
    """A row as short cells, by their titles; of one that was not timed the reason alone."""
    if row["time_s"] is None:
        return {"time": f"skipped: {row['skipped']}"}
    cells = {"time": seconds(row["time_s"]), "spread": f"{100 * spread(row):.0f}%"}
    if row.get("host_s") is not None:
        cells["host"] = seconds(row["host_s"])
    if row.get("ratio") is not None:
        cells["PyTorch"] = f"{row['ratio']:.2f}x"
    if row.get("peer_ratio") is not None:
        cells["best"] = f"{row['peer_ratio']:.2f}x"
    if rate(row):
        cells["rate"] = rate(row)
    if row.get("efficiency") is not None:
        cells["ceiling"] = f"{100 * row['efficiency']:.0f}%"
    if row.get("limit") and row["error"] is not None:
        cells["error"] = f"{row['error'] / row['limit']:.2f}"
    if row.get("peak_bytes") is not None:
        cells["memory"] = size(row["peak_bytes"])
    return cells


def rate(row: Row) -> str:
    """How much of what binds a row it does in a second; tokens of a whole model; nothing where none
    of it is counted."""
    tokens, flops, moved = (row.get(f"{what}_per_s") for what in ("tokens", "flops", "bytes"))
    if tokens is not None:
        return f"{tokens:,.0f} tokens/s"
    if moved is not None and (row.get("bound") == "memory" or flops is None):
        return byte_rate(moved)
    return "" if flops is None else flop_rate(flops)


def seconds(value: float | None) -> str:
    """A duration with a fitting unit; "-" where there is none."""
    return "-" if value is None else _scaled(value, _SECONDS)


def flop_rate(value: float) -> str:
    """FLOP/s with a fitting unit."""
    return _scaled(value, _FLOPS)


def byte_rate(value: float) -> str:
    """Bytes per second with a fitting unit."""
    return _scaled(value, _BYTES_PER_S)


def size(value: float) -> str:
    """Bytes with a fitting unit."""
    return _scaled(value, _BYTES)


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """With three digits, or all of a larger number."""
    # 999.6 of a unit would be rounded to 1,000.
    scale, unit = next((u for u in units if value >= 0.9995 * u[0]), units[-1])
    number = value / scale
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
