"""Compiles the Triton kernels that `make gpu-tune` will time, beside it: it then finds them in
Triton's cache on disk. Compiling one takes seconds, and there are hundreds.

    python -m benchmarks.tune_ahead --share 0 --of 8

Each of 8 such processes takes every eighth kernel. Nothing is launched: the tensors are on the
device meta, so they have no content and take no memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import child_environment, tune_cases
from gptkernels.bench import predict

_MOST_PROCESSES = 8  # each takes some 400 MB of the GPU's memory, for CUDA itself
_OTHER_CPUS = 2  # for the process that times, and for the compilers that it starts itself


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, the processes run. At the end those that failed are named."""
    count = max(1, min(_MOST_PROCESSES, _usable_cpus() - _OTHER_CPUS))
    command = [sys.executable, "-P", "-m", "benchmarks.tune_ahead"]
    processes: list[subprocess.Popen[Any]] = []
    try:
        for i in range(count):
            share = [f"--share={i}", f"--of={count}"]
            processes.append(subprocess.Popen([*command, *share], env=child_environment()))
        yield
    finally:
        for i, process in enumerate(processes):
            if code := process.poll():
                who = f"the process that compiled share {i} of {count} ahead"
                print(f"{who} ended with {code}", file=sys.stderr, flush=True)
            process.kill()
            process.wait()


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compile_share(share: int, of: int, gpu: torch.device) -> None:
    """Compiles every kernel whose number leaves `share` when divided by `of`, for this GPU."""
    place = tune_cases.Place(torch.device("meta"), None, gpu)
    ways = [
        way
        for problem in predict.PROBLEMS
        for case in tune_cases.cases(problem, place)
        for way in case.ways
    ]
    ways.sort(key=lambda way: not way.chosen)
    with _compiling_alone():
        for way in ways[share::of]:
            # The process that times it compiles it again, and reports the error.
            with contextlib.suppress(Exception):
                way.call()


@contextlib.contextmanager
def _compiling_alone() -> Iterator[None]:
    """Inside, a launch compiles the kernel and does not run it."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_alone(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, warmup=True, **options)

    JITFunction.run = compile_alone
    try:
        yield
    finally:
        JITFunction.run = run


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_ahead", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args(arguments)
    os.nice(10)  # kernels are timed at the same time
    compile_share(options.share, options.of, torch.device("cuda", torch.cuda.current_device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
