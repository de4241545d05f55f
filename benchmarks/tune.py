"""`make gpu-tune`: every way to build the CUDA C++ kernels and the tiles of Triton's, checked and
timed on a GPU beside the best that others offer, most valuable first. A few minutes; needs PyTorch,
and the extension or Triton.

    python -m benchmarks.tune --results FOLDER --minutes 8

For each case (of `tune_cases`, in the order of `predict.PROBLEMS`) the peers are timed, then each
of our kernels is held to the truth, and where it is right timed beside the best peer, in turns.
First come the launchers' own choices for the first problem of every operator, then what else could
run there, then the other problems. Triton's kernels are compiled beside it (`tune_ahead`).

Every row is added to FOLDER/tune.jsonl as it comes, and what stands there for the same GPU and the
same kernels is not done again: a run that was cut short, or whose kernel took its process with it,
goes on where it stopped. Each operator has processes of its own; one that crashed, or from which
nothing came for long, is started again without the row at which it ended. At the end comes a table,
also as FOLDER/tune.json: of each case the best of our kernels in CUDA C++ and in Triton, TFLOP/s or
GB/s, its share of the ceiling measured on this GPU, the ratio to the best peer, the error beside
its limit, and what was predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import child_environment, tune_ahead, tune_cases
from benchmarks.tune_rows import NO_MEMORY, Rows, best_peer, here, now, say, table
from gptkernels.bench import dry_run, predict, timing
from gptkernels.bench.case import Call
from gptkernels.bench.environment import environment
from gptkernels.bench.results import Row, write_json
from gptkernels.core import ceilings
from gptkernels.core.arguments import new_folder
from gptkernels.core.choice import unavailable
from gptkernels.tuning import tiles

# One process each, in this order: of the most valuable problem of every operator the launchers'
# choices, then all that could run; then the other problems.
_OPS = ("attention", "gelu_mlp", "layer_norm")
_WHICH = ("chosen", "first", "rest")
PARTS = tuple((op, which) for which in _WHICH for op in _OPS)
_BUDGET_S = 0.3  # of one comparison
_LARGE = 1 << 30  # bytes that lie in no cache
_GRACE_S = 10.0  # after its time a process is stopped
_STUCK_S = 90.0  # so is one that has added no row for so long: a kernel waits for itself
_POLL_S = 0.2
_OUT_OF_TIME, _POISONED = 3, 4  # exit codes of a process; the latter: its GPU takes no more calls
_TOLD_TO_END = (_OUT_OF_TIME, -signal.SIGTERM)


# ---- one process


def run_part(op: str, which: str, rows: Rows, device: torch.device, until: float) -> int:
    """0; or that the time (of time.time()) was up. Rows that are there already are skipped."""
    place, tuner = tune_cases.Place.here(device), _Tuner(rows, device)
    for problem in _problems(op, which):
        try:
            for case in tune_cases.cases(problem, place):
                for step in tuner.steps(case, chosen_alone=which == "chosen"):
                    if time.time() > until:
                        return _OUT_OF_TIME
                    step()
                    if not _usable(device):
                        return _POISONED
        except torch.OutOfMemoryError as error:  # of the inputs: the other problems may fit
            head = {"op": op, "problem": problem.text, "kind": "inputs", "status": NO_MEMORY}
            say(rows.add(**head, direction="", way="", reason=_sentence(error)))
    return 0


def _usable(device: torch.device) -> bool:
    """Whether the process can go on: an error of a kernel stays with it for good."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _problems(op: str, which: str) -> list[dry_run.Problem]:
    found = [problem for problem in predict.PROBLEMS if problem.op == op]
    return found[1:] if which == "rest" else found[:1]


def _predicted_s(case: tune_cases.Case, way: tune_cases.Way) -> float | None:
    """Of CUDA C++ kernels alone."""
    if way.impl != "cuda":
        return None
    return _predicted().get((case.problem, case.direction, way.name))


@functools.cache
def _predicted() -> dict[tuple[str, str, str], float]:
    return {(p.problem, p.direction, p.way): p.seconds for p in predict.predictions()}


@dataclass(frozen=True)
class _Tuner:
    """Adds a row for each peer, each of our kernels, and each ceiling of the GPU."""

    rows: Rows
    device: torch.device

    def steps(
        self, case: tune_cases.Case, *, chosen_alone: bool = False
    ) -> Iterator[Callable[[], None]]:
        """What is to be done for a case, in order; each writes one row."""
        name = (case.op, case.problem, case.direction)
        for peer in case.peers if case.ways else ():
            if self.rows.get(*name, peer) is None:
                yield functools.partial(self._time_peer, case, peer)
        for way in (way for way in case.ways if way.chosen or not chosen_alone):
            if self.rows.get(*name, way.name) is None:
                yield functools.partial(self._try_way, case, way)

    def _time_peer(self, case: tune_cases.Case, peer: str) -> None:
        with _told(self.rows, _head(case, peer, "peer"), "skipped") as row:  # not importable, say
            timed = self._timed({peer: case.peers[peer]()})[peer]
            row |= {"status": "timed", **self._figures(case, timed)}

    def _try_way(self, case: tune_cases.Case, way: tune_cases.Way) -> None:
        """Checks one of our kernels, and times it beside the best peer where it is right."""
        head = {
            **_head(case, way.name, "ours"),
            "impl": way.impl,
            **way.made,
            "chosen": way.chosen,
            "predicted_s": _predicted_s(case, way),
        }
        with _told(self.rows, head, "failed") as row:
            try:
                result = way.call()
            except Exception as error:
                # The launchers choose no tile that does not fit.
                if way.chosen or way.impl != "triton" or not tiles.does_not_fit(error):
                    raise
                row |= {"status": "skipped", "reason": f"does not fit: {_sentence(error)}"}
                return
            measured = case.check(result)
            row |= {"error": _finite(measured.error), "limit": _finite(measured.limit)}
            if not measured.passed:
                row["status"] = "wrong"
                return
            best = best_peer(case.op, case.problem, case.direction, case.peers, self.rows)
            row |= self._alone(case, way) if best is None else self._beside(case, way, best)

    def _alone(self, case: tune_cases.Case, way: tune_cases.Way) -> Row:
        timed = self._timed({way.name: way.call})[way.name]
        return {"status": "timed", **self._figures(case, timed)}

    def _beside(self, case: tune_cases.Case, way: tune_cases.Way, peer: str) -> Row:
        """In turns with the peer; alone, which the row says, where that raises."""
        try:
            timed = self._timed({way.name: way.call, peer: case.peers[peer]()})
        except Exception as error:
            raised = _sentence(error)
        else:
            peer_s, time_s = timed[peer].time_s, timed[way.name].time_s
            compared = {"peer": peer, "peer_s": peer_s, "ratio": peer_s / time_s}
            return {"status": "timed", **self._figures(case, timed[way.name]), **compared}
        reason = f"beside {peer}: {raised}"
        if not _usable(self.device):
            # Either may be at fault: another process tries again, without this peer.
            without = {"status": "skipped", "reason": f"beside {way.name}: {raised}"}
            say(self.rows.add(**_head(case, peer, "peer"), **without))
            return {"status": "unfinished", "reason": reason}
        torch.cuda.empty_cache()
        return {**self._alone(case, way), "reason": f"timed alone; {reason}"}

    def _timed(self, calls: dict[str, Call]) -> dict[str, timing.Timing]:
        return timing.compare(calls, device=self.device, budget_s=_BUDGET_S)

    def _figures(self, case: tune_cases.Case, timed: timing.Timing) -> dict[str, Any]:
        """Times, rates, and the share of the ceiling that was measured here."""
        found = {**timed.as_dict(), "flops": case.flops, "bytes": case.bytes}
        rate = (case.flops or case.bytes) / timed.time_s
        ceiling = self._ceiling("products" if case.flops else "memory")
        return found | {"rate": rate, "share": rate / ceiling}

    def _ceiling(self, kind: str) -> float:
        """FLOP or bytes a second, measured once for all processes."""
        row = self.rows.get("ceiling", "", "", kind)
        if row is None:
            if kind == "memory":
                rate = ceilings.memory_rate(self.device, _LARGE)
            else:
                rate = ceilings.product_rate(self.device, torch.bfloat16)
            if rate is None:
                raise torch.OutOfMemoryError("no memory is left to measure what this GPU can do")
            row = self.rows.add(op="ceiling", way=kind, kind="ceiling", status="timed", rate=rate)
        return row["rate"]


def _head(case: tune_cases.Case, way: str, kind: str) -> Row:
    return {
        "op": case.op,
        "problem": case.problem,
        "direction": case.direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "way": way,
        "kind": kind,
    }


@contextlib.contextmanager
def _told(rows: Rows, head: Row, broken: str) -> Iterator[Row]:
    """Writes a row as started, and then with what is added to the row that this yields, or with the
    error and the status `broken`."""
    rows.add(**head, status="started")
    row = dict(head)
    try:
        yield row
    except torch.OutOfMemoryError as error:  # the truth, or the peer, takes more than the kernel
        torch.cuda.empty_cache()
        row |= {"status": NO_MEMORY, "reason": _sentence(error)}
    except Exception as error:
        row |= {"status": broken, "reason": _sentence(error)}
    say(rows.add(**row))


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no others


# ---- all of them


def run(results: Path, until: float, about: dict[str, Any]) -> int:
    """Every part in processes of its own until the time (of time.time()) is up, then the table.

    Returns 0; 1 where one of our kernels was wrong, failed or crashed (of Triton's tiles that are
    not the launcher's choice: was wrong or failed), or time was up before all were done.
    """
    path = results / "tune.jsonl"
    # Nothing runs yet: at these an earlier run ended as a whole.
    before = Rows(path, about)
    for row in before.started():
        before.add(**(row | {"status": "unfinished", "reason": "the run ended", "time": now()}))
    complete = True
    for op, which in PARTS:
        complete &= _run_part_apart(op, which, results, path, until, about)
    rows = Rows(path, about)
    lines = list(table(rows))
    print("\n".join(lines))
    content = {
        "environment": environment(),
        "finished": complete,
        "table": lines,
        "rows": list(rows.found.values()),
    }
    write_json(results / "tune.json", content)
    print(f"Rows are in {path}, the table in {results / 'tune.json'}")
    broken = [row for row in rows.found.values() if row["status"] in ("wrong", "failed", "crashed")]
    for row in broken:
        say(row)
    return 0 if complete and all(map(_excused, broken)) else 1


def _excused(row: Row) -> bool:
    """Whether a row that says "wrong", "failed" or "crashed" leaves the run a success: peers, and
    tiles that the compiler aborts at, as it may at those that do not fit."""
    if row["kind"] != "ours":
        return True
    return bool(row["status"] == "crashed" and row["impl"] == "triton" and not row["chosen"])


def _run_part_apart(
    op: str, which: str, results: Path, path: Path, until: float, about: dict[str, Any]
) -> bool:
    """Whether everything of it was done. A process that crashed is started again, and does not do
    again what it crashed at."""
    while time.time() < until:
        process = subprocess.Popen(
            _command(op, which, results, until, about), env=child_environment()
        )
        try:
            code, ended = _wait(process, path, until)
        finally:
            process.kill()
            process.wait()
        rows = Rows(path, about)
        crashed = rows.started()
        for row in crashed:
            status = "unfinished" if code in _TOLD_TO_END else "crashed"
            say(rows.add(**(row | {"status": status, "reason": ended, "time": now()})))
        if code == 0:
            return True
        if code in _TOLD_TO_END:
            return False
        if not crashed and code != _POISONED:  # it would end so again
            print(f"{op}, {which}: {ended}", file=sys.stderr, flush=True)
            return False
    return False


def _wait(process: subprocess.Popen[Any], path: Path, until: float) -> tuple[int, str]:
    """A process's exit code, and how it ended in words; it is to be stopped when time is up, or
    when no row has come for long."""
    started = time.time()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=_POLL_S)
            return code, f"its process ended with {code}"
        now = time.time()
        written = path.stat().st_mtime if path.exists() else started
        if now > until + _GRACE_S:
            return _OUT_OF_TIME, "its time was up"
        if now - max(started, written) > _STUCK_S:
            return -signal.SIGKILL, f"it had not ended after {_STUCK_S:.0f} s"


def _command(op: str, which: str, results: Path, until: float, about: dict[str, Any]) -> list[str]:
    part = [f"--part={op}", f"--which={which}", f"--until={until}", f"--results={results}"]
    told = f"--about={json.dumps(about)}"  # to find it out, all packages of peers are imported
    return [sys.executable, "-P", "-m", "benchmarks.tune", *part, told]


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that no child goes on without this process."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it often comes twice, the second from make
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 as `run` does; 2 where nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--results", type=new_folder, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--since", type=float, help="when they began, in seconds of the epoch")
    parser.add_argument("--part", choices=_OPS, help=argparse.SUPPRESS)
    parser.add_argument("--which", choices=_WHICH, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--about", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu-tune needs an NVIDIA GPU that PyTorch can use", file=sys.stderr)
        return 2
    names = {"cuda": "the CUDA C++ kernels", "triton": "Triton's kernels"}
    reasons = {impl: unavailable(impl, "cuda", torch.bfloat16) for impl in names}
    missing = [f"{names[impl]}: {why}" for impl, why in reasons.items() if why is not None]
    if len(missing) == len(names):
        print(f"make gpu-tune needs kernels; it lacks {'; '.join(missing)}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if options.part is not None:
        rows = Rows(options.results / "tune.jsonl", options.about)
        return run_part(options.part, options.which, rows, device, options.until)
    for lacking in missing:
        print(f"going on without {lacking}", flush=True)
    since = time.time() if options.since is None else options.since
    ahead = tune_ahead.compiling() if reasons["triton"] is None else contextlib.nullcontext()
    with _stopped_in_order(), ahead:
        return run(options.results, since + 60 * options.minutes, here(device))


if __name__ == "__main__":
    sys.exit(main())
