"""What `gptkernels prepare` holds in memory at most, and how fast it is, on a corpus made here.

    python -m benchmarks.prepare_memory FOLDER [--megabytes 1000] [--tokenizer gpt2] [--json FILE]

FOLDER holds text files (.txt), such as WikiText. The corpus is one file of JSON lines in a
temporary folder: each line has a text of 200 to 1,200 of their words, four in a row from each of
many places drawn at random. So the words are real, no text resembles another, and every text is
kept: the work of one that is dropped would be less.

`prepare` runs in a process of its own. Linux keeps the highest resident size of each (VmHWM); those
of the workers are read from it until they end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_file
from gptkernels.gpt.corpus import manifest as manifests

_POLL_S, _ROW_S = 0.5, 30.0


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokenizer", default="gpt2", help="most of the time is its")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus, out = Path(temporary) / "corpus.jsonl", Path(temporary) / "out"
        _make(corpus, options.folder, options.megabytes * 10**6)
        row = _prepare(corpus, out, options.processes, options.tokenizer)
    for key, value in row.items():
        print(f"{key}: {value}")
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": [row]})


def _make(corpus: Path, folder: Path, size: int) -> None:
    words = [word for file in sorted(folder.rglob("*.txt")) for word in file.read_text().split()]
    rows = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    draw = random.Random(0)
    with corpus.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            text = " ".join(draw.choices(rows, k=draw.randint(50, 300)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _prepare(corpus: Path, out: Path, processes: int, tokenizer: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gptkernels", "prepare", str(corpus), "--out", str(out)]
    command += ["--processes", str(processes), "--tokenizer", tokenizer]
    started = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    growth: list[dict[str, int]] = []
    while run.poll() is None:
        for process in (run.pid, *_children(run.pid)):
            peaks[process] = max(peaks.get(process, 0), _peak_bytes(process))
        if time.perf_counter() - started > _ROW_S * (len(growth) + 1):
            growth.append({**_on_disk(out), **_largest(peaks, run.pid)})
            print(growth[-1], flush=True)
        time.sleep(_POLL_S)
    seconds = time.perf_counter() - started
    if run.returncode:
        raise SystemExit(f"prepare ended with {run.returncode}")
    size = corpus.stat().st_size
    return {
        "input_bytes": size,
        "tokenizer": tokenizer,
        "processes": processes,
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(size / 1e6 / seconds, 2),
        **_largest(peaks, run.pid),
        "counts": manifests.read(out).counts,
        "growth": growth,  # every 30 seconds
    }


def _largest(peaks: dict[int, int], run: int) -> dict[str, int]:
    workers = [peak for process, peak in peaks.items() if process != run]
    return {"main_peak_bytes": peaks[run], "worker_peak_bytes": max(workers, default=0)}


def _on_disk(out: Path) -> dict[str, int]:
    ends = {"shard_bytes": "*.bin", "database_bytes": "state.sqlite"}
    return {key: sum(file.stat().st_size for file in out.glob(end)) for key, end in ends.items()}


def _children(parent: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _peak_bytes(process: int) -> int:
    """0 for one that has just ended."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
