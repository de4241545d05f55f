"""`make gpu`: what a few minutes on a machine with an NVIDIA GPU can tell, most valuable first.

1. every test that is marked `gpu`: the native kernels and a GPT against the truth, repeated,
   captured, on side streams (`tests/bench/test_gpu.py`); the CUDA kernels' building blocks against
   cases worked by hand, which the emulator is held to as well (test_emulator.py, test_clusters.py,
   test_hopper.py and test_tma.py in `tests/emulator`);
2. the parity table of `gptkernels verify`;
3. `gptkernels tune` for a training step and for generation of GPT-2 124M in bf16: what "auto" would
   take on this GPU, and which candidate is refused;
4. the CUDA C++ kernels, where they are built, beside the emulator (benchmarks/twins.py);
5. the same kernels under compute-sanitizer's memcheck and racecheck, where it is and can run;
6. the benchmarks, one shape of each operator first, then all.

Every part runs in a process of its own, because a kernel that touches wrong memory takes its
process with it, and is stopped when its time is up. Results are written as they come, so that what
is cut short leaves what it had. Needs PyTorch, Triton, pytest and numpy, and no network.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import child_environment
from gptkernels import bench
from gptkernels.bench import OPERATORS
from gptkernels.bench.environment import environment
from gptkernels.bench.results import Results, recorded, write_json
from gptkernels.bench.run import head, run, wanted_peers
from gptkernels.bench.text import figures
from gptkernels.core.choice import unavailable
from gptkernels.core.files import make_folder
from gptkernels.gpt.config import GPTConfig
from gptkernels.truth import verify
from gptkernels.tuning import tune
from gptkernels.tuning.models import classes_of
from gptkernels.tuning.trial import is_pytorchs

_TESTS = tuple(
    Path(f"tests/{name}.py")
    for name in (
        "bench/test_gpu",
        "emulator/test_emulator",
        "emulator/test_clusters",
        "emulator/test_hopper",
        "emulator/test_tma",
        "ops/test_watched",
        "tuning/test_canary",
        "tuning/test_gpu_ways",
    )
)
# When each part must have ended, as a share of the whole time.
_TESTS_END, _PARITY_END, _TUNED_END, _TWINS_END, _SANITIZED_END, _QUICK_END = (
    0.38, 0.5, 0.65, 0.73, 0.81, 0.9,
)  # fmt: skip
# Of tuning, for training and for generation each: it ends a class that it has begun.
_TUNE_S = 25.0
_CUT_SHORT = "cut short: its time was up"
_IMPLS = ("triton", "cuda", "torch")


@dataclass(frozen=True)
class _Part:
    name: str
    arguments: list[str]  # of Python, from the module on
    results: Path
    before: tuple[str, ...] = ()  # a program that runs Python
    variables: tuple[tuple[str, str], ...] = ()  # added to the environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a test or parity row failed or was cut short; 2 where nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument(
        "--part", choices=("parity", "tune", "speed", "sanitized"), help=argparse.SUPPRESS
    )
    parser.add_argument("--op", choices=OPERATORS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that PyTorch can use, and finds none", file=sys.stderr)
        return 2
    if options.part == "parity":
        return _parity(options.op, options.results)
    if options.part == "tune":
        return _tune(options.results)
    if options.part == "sanitized":
        return _sanitized(options.op, options.results)
    if options.part == "speed":
        return _speed(options.quick, options.results)
    if not _TESTS[0].exists():
        print(f"{_TESTS[0]} is not here; run from the root of the checkout", file=sys.stderr)
        return 2
    return _all(options.results, 60 * options.minutes)


def _all(results: Path, seconds: float) -> int:
    started = time.monotonic()
    make_folder("results", results)
    # Of an earlier run, where this one skips them.
    for name in (
        "tuned.json",
        "twins.json",
        "sanitizer.json",
        "speed_quick.json",
        "speed_full.json",
    ):
        (results / name).unlink(missing_ok=True)

    def until(share: float) -> float:
        return started + share * seconds

    # Side by side, because compiling on the CPU takes nearly all of the time.
    shares = _shares(os.cpu_count() or 1)
    tests = [_test_part(k, shares, results / f"tests_{k}.json") for k in range(1, shares + 1)]
    right = _run(tests, until(_TESTS_END), results / "tests.json")
    # The kernels are compiled by now.
    parity = _of_operators("parity", results, "benchmarks.gpu", "--part=parity")
    right &= _run(parity, until(_PARITY_END), results / "parity.json")
    # Alone: what runs beside a kernel would change its time.
    path = results / "tuned.json"
    tuning = _Part("tuning", ["benchmarks.gpu", "--part=tune", f"--results={path}"], path)
    right &= _run([tuning], until(_TUNED_END), path, cut_short_passes=True)
    reason = unavailable("cuda", "cuda", torch.float32)
    if reason is None:
        twins = _of_operators("twins", results, "benchmarks.twins")
        right &= _run(twins, until(_TWINS_END), results / "twins.json")
        right &= _sanitize(until(_SANITIZED_END), results / "sanitizer.json")
    else:
        print(f"=== twins and compute-sanitizer: skipped, {reason}", flush=True)
    # One after the other, as above.
    for name, end, extra in (("quick", _QUICK_END, ["--quick"]), ("full", 1.0, [])):
        path = results / f"speed_{name}.json"
        arguments = ["benchmarks.gpu", "--part=speed", f"--results={path}", *extra]
        part = _Part(f"speed, {name}", arguments, path)
        right &= _run([part], until(end), path, cut_short_passes=True)
        right &= not any(row.get("failed") for row in _rows(path))
    print(f"Results are in {results}, after {time.monotonic() - started:.0f} s")
    print("`make gpu-tune` times every build and tile of the kernels, beside the best of others")
    return 0 if right else 1


def _shares(cpus: int) -> int:
    """Into how many shares the tests are dealt out: two CPUs for each, as far as they go.

    Never a multiple of 3: neighbouring tests are often one in three dtypes, of which float32 takes
    longest to compile, and it would always fall to the same shares.
    """
    return next(count for count in (5, 4, 2, 1) if count <= cpus // 2 or count == 1)


def _test_part(share: int, shares: int, path: Path) -> _Part:
    # Without conftest.py, which needs packages that this run can do without.
    choice = ["--noconftest", "-p", "no:cacheprovider", "-m", "gpu", *map(str, _TESTS)]
    record = ["-p", "benchmarks.record", f"--record={path}", f"--share={share}/{shares}"]
    name = f"tests, share {share} of {shares}"
    return _Part(name, ["pytest", "-q", "--tb=short", *record, *choice], path)


def _of_operators(name: str, results: Path, *arguments: str, **others: Any) -> list[_Part]:
    """A part for each operator, so that a crash stops no other. `arguments` as of `_Part`."""
    paths = {op: results / f"{name}_{op}.json" for op in OPERATORS}
    return [
        _Part(f"{name} of {op}", [*arguments, f"--op={op}", f"--results={path}"], path, **others)
        for op, path in paths.items()
    ]


def _run(parts: list[_Part], end: float, together: Path, *, cut_short_passes: bool = False) -> bool:
    """Runs the parts side by side until they end or `end` (monotonic), joins their results in the
    file `together`, and tells whether all passed.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        ended = pool.map(functools.partial(_run_part, end=end), parts)
        passed = True
        for part, (verdict, output) in zip(parts, ended, strict=True):
            print(f"=== {part.name}: {verdict}\n{output.decode(errors='replace')}", flush=True)
            passed &= verdict == "passed" or (cut_short_passes and verdict == _CUT_SHORT)
    _join([part.results for part in parts], together)
    return passed


def _run_part(part: _Part, end: float) -> tuple[str, bytes]:
    """Runs it until `end`; returns how it ended, and what it printed."""
    try:
        done = subprocess.run(
            [*part.before, sys.executable, "-P", "-m", *part.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(**dict(part.variables)),
            timeout=max(1.0, end - time.monotonic()),
            check=False,
        )
        return f"exit code {done.returncode}" if done.returncode else "passed", done.stdout
    except subprocess.TimeoutExpired as error:
        return _CUT_SHORT, error.stdout or b""


def _sanitize(end: float, path: Path) -> bool:
    """Runs the CUDA C++ kernels under compute-sanitizer, if it works here, a process for each tool
    and operator, and tells whether it found nothing.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("=== compute-sanitizer: skipped, it is not on PATH", flush=True)
        return True
    anything = [program, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    try:
        subprocess.run(
            anything,
            capture_output=True,
            check=True,
            timeout=max(1.0, (end - time.monotonic()) / 2),
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        print("=== compute-sanitizer: skipped, it cannot run on this device", flush=True)
        return True
    parts = []
    for tool in ("memcheck", "racecheck"):
        # Only kernels of namespace gk. Each tensor gets its own allocation (below), so that an
        # access past its end is found.
        before = (program, f"--tool={tool}", "--error-exitcode=1", "--kernel-name=kns=_ZN2gk")
        variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        own = ("benchmarks.gpu", "--part=sanitized")
        parts += _of_operators(tool, path.parent, *own, before=before, variables=variables)
    return _run(parts, end, path)


def _join(paths: list[Path], together: Path) -> None:
    """One file of all rows in place of one for each part; a part that left none is unfinished."""
    if paths == [together]:
        return
    contents = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    joined = {
        "environment": environment(),
        "finished": all(content.get("finished", False) for content in contents),
        "rows": [row for content in contents for row in content.get("rows", [])],
    }
    write_json(together, joined)
    for path in paths:
        path.unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def _parity(op: str, path: Path) -> int:
    failed = 0
    rows = (row.as_dict() for row in verify.run(impls=_IMPLS, ops=[op], device="cuda"))
    for row in recorded(rows, path):
        if row["status"] != "pass":
            print(row, flush=True)
        failed += row["status"] == "fail"
    return 1 if failed else 0


def _tune(path: Path) -> int:
    """Returns 1 where a candidate of ours was wrong, or nothing could be measured."""
    config, device = GPTConfig.named("gpt2"), torch.device("cuda")
    kinds: dict[str, Any] = {
        "training": {"batch": 8, "tokens": 1024, "train": True, "autocast": True},
        "generation": {"batch": 8, "tokens": 512, "train": False},
    }
    rows: list[dict[str, Any]] = []
    measured, wrong = 0, False
    for kind in kinds.values():
        classes = classes_of(config, torch.bfloat16, device, **kind)
        report = tune(classes, seconds=_TUNE_S)
        measured += len(report.entries)
        for entry in report.entries:
            print(entry.key, *entry.ranges, flush=True)
            rows.append(entry.as_dict())
        for key, way, why in report.refused:
            print(f"{key}: {way} refused: {why}", flush=True)
            wrong |= why.startswith("it is wrong") and not is_pytorchs(way)
        for key, why in report.cannot.items():
            print(f"{key}: not measured: {why}", flush=True)
        write_json(path, {"environment": environment(), "rows": rows})
    return int(wrong or not measured)


def _sanitized(op: str, path: Path) -> int:
    """Each case of the parity table in two dtypes; what is found is on compute-sanitizer to say."""
    dtypes = (torch.bfloat16, torch.float32)
    rows = verify.run(impls=("cuda",), ops=[op], dtypes=dtypes, device="cuda")
    for row in recorded((row.as_dict() for row in rows), path):
        print(f"{row['case']} {row['dtype']} {row['direction']}: {row['status']}", flush=True)
    return 0


def _speed(quick: bool, path: Path) -> int:
    """Returns 1 where one of our implementations failed or was wrong."""
    device, level = torch.device("cuda"), "quick" if quick else "full"
    steps = bench.steps(OPERATORS + bench.MODELS, device, level)
    results = Results(path)
    results.begin(level=level, device="cuda", **head(device, [step.dtype for step in steps]))
    # Without max-autotune, which would take all of the time.
    every: dict[str, Any] = {"impls": _IMPLS, "peers": wanted_peers((), "default")}
    for _, rows in run(steps, results, device=device, level=level, **every):
        for row in rows:
            what = f"{row['op']} {row['shape']} {row['dtype']} {row['direction']} {row['impl']}"
            print(what, *(f"{k} {v}" for k, v in figures(row).items()), flush=True)
    return int(any(row.get("failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
