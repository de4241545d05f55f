"""Kills `prepare` again and again on real text, and compares what it ends with.

    python -m benchmarks.prepare_kills FOLDER [--kills 30] [--processes 2] [--json FILE]

FOLDER holds text files (.txt). Their paragraphs become a file of JSON lines, every tenth of them
twice. One run is left alone. Another is killed by SIGKILL, with its workers at work, at a random
moment after it has begun to write, and begun again, until it ends; its files then have to be those
of the first, to the byte. That is repeated, in a new folder, until there were enough kills. Each
life commits after every chunk of 64 records, so that it gets somewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_file
from gptkernels.gpt.corpus import prepare as module
from gptkernels.gpt.corpus.config import PrepareConfig

_CONFIG = PrepareConfig(shard_tokens=100_000)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )
    parser.add_argument("--live", type=Path, metavar="OUT", help=argparse.SUPPRESS)  # in a child
    options = parser.parse_args()
    if options.live:
        _live(options.folder, options.live, options.processes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        row = _kill(Path(temporary), options.folder, options.kills, options.processes, options.seed)
    print(", ".join(f"{key} {value}" for key, value in row.items() if key != "lives"))
    if options.json:
        write_json(options.json, {"environment": environment(), "rows": [row]})


def _live(corpus: Path, out: Path, processes: int) -> None:
    module._CHUNK_RECORDS, module._COMMIT_CHUNKS = 64, 1

    def tell(counts: dict[str, int], done: int, total: int) -> None:
        print(counts["records"], flush=True)

    module.prepare([corpus], out, config=_CONFIG, processes=processes, observer=tell)


def _kill(place: Path, folder: Path, kills: int, processes: int, seed: int) -> dict[str, Any]:
    corpus, draw = place / "corpus.jsonl", random.Random(seed)
    records = _make(corpus, folder)
    started = time.perf_counter()
    _begun(corpus, place / "whole", processes).communicate()
    longest = (time.perf_counter() - started) / 8
    whole = _sums(place / "whole")
    lives: list[dict[str, Any]] = []
    runs, killed = 0, 0
    while killed < kills:
        out = place / f"out{runs}"
        while True:
            run = _begun(corpus, out, processes)
            assert run.stdout is not None
            printed = [run.stdout.readline()]  # a life that had nothing left to do prints nothing
            time.sleep(draw.uniform(0, longest))
            run.kill()
            printed += run.communicate()[0].split()
            seen = [int(number) for number in printed if number]
            lives.append({"run": runs, "records": seen[-1:], "code": run.returncode})
            if not run.returncode:
                break
            killed += 1
        if _sums(out) != whole:
            raise SystemExit(f"run {runs} differs from the one that was not killed: {lives}")
        runs += 1
    return {"records": records, "runs": runs, "kills": killed, "differing": 0, "lives": lives}


def _begun(corpus: Path, out: Path, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.prepare_kills", str(corpus), "--live", str(out)]
    return subprocess.Popen(
        [*command, "--processes", str(processes)], stdout=subprocess.PIPE, text=True
    )


def _make(corpus: Path, folder: Path) -> int:
    texts = (file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt")))
    paragraphs = [part for text in texts for part in text.split("\n") if part.strip()]
    paragraphs += paragraphs[::10]
    random.Random(0).shuffle(paragraphs)
    lines = (json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)
    corpus.write_text("".join(lines), encoding="utf-8")
    return len(paragraphs)


def _sums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


if __name__ == "__main__":
    main()
