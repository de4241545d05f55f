"""Runs flash-attn's own tests, unmodified, with `gptkernels.flash_attn_interface` in the place of
flash-attn, on a CPU.

    git clone --branch v2.8.3 https://github.com/Dao-AILab/flash-attention
    pip install einops pytest
    python scripts/flash_attn_tests.py --source flash-attention --cases 2000 --seed 0

The test files have 540,301 cases in 2.8.3. Drawn are as many of each test function, as far as it
has them. A case that takes more CPU time than --seconds, or more memory than --memory, is too large
for the machine; then none of that test function runs whose sizes (seqlen, d ...) are all as large.
The table counts what passed, what this package refuses and by which argument, what failed and why,
and what the tests skip themselves; Ctrl-C ends the run, and prints that of the cases so far. The
exit code is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_stand_in import modules, on_a_cpu

import gptkernels

FILES = (
    "tests/test_flash_attn.py",
    "tests/ops/test_dropout_layer_norm.py",
    "tests/ops/triton/test_layer_norm.py",
)
SIZES = ("seqlen", "seqlen_q", "seqlen_k", "d", "hidden_size")
OUTCOMES = ("passed", "refused", "failed", "skipped", "too large")
_OURS = str(Path(gptkernels.__file__).parent)


class TooLarge(BaseException):
    """A case took more time or memory than it may."""


class Sample:
    """A plugin of pytest: draws the cases, and stops those that are too large."""

    def __init__(self, cases: int, seed: int, seconds: float) -> None:
        self.cases, self.seed, self.seconds = cases, seed, seconds
        self.available: Counter[str] = Counter()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.refused: Counter[str] = Counter()
        self.failures: list[str] = []
        self.large: dict[str, list[dict[str, int]]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Puts a sample of a test's parameters in the place of all of them."""
        marks = list(metafunc.definition.iter_markers("parametrize"))
        others = [mark for mark in metafunc.definition.own_markers if mark not in marks]
        metafunc.definition.own_markers = others
        total = math.prod(len(mark.args[1]) for mark in marks)
        self.available[metafunc.function.__name__] = total
        if not marks:
            return
        draw = random.Random(f"{self.seed} {metafunc.function.__name__}")
        names = [name for mark in marks for name in _names(mark)]
        numbers = draw.sample(range(total), min(total, self.cases))
        values = [[*_case(marks, number)] for number in numbers]
        ids = ["-".join(map(_word, case)) for case in values]
        metafunc.parametrize(names, values, ids=ids)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps as many cases of each test as of any other, as far as it has them."""
        of_each: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            of_each[_test(item)].append(item)
        kept: list[pytest.Item] = []
        for number in range(max(map(len, of_each.values()), default=0)):
            kept += [drawn[number] for drawn in of_each.values() if number < len(drawn)]
        items[:] = kept[: self.cases]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Runs a case within its time."""
        sizes = _sizes(item)
        for other in self.large[_test(item)]:
            if all(sizes[name] >= other[name] for name in other):
                raise TooLarge
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            return (yield)
        except TooLarge:
            self.large[_test(item)].append(sizes)
            raise
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
                raise
            self.large[_test(item)].append(sizes)
            raise TooLarge from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        """Counts the outcome of a case."""
        if call.when == "call":
            outcome = self._outcome(item, call.excinfo)
            self.counts[_test(item)][outcome] += 1
            if outcome in ("refused", "skipped", "too large"):
                call.excinfo = None
        return (yield)

    def _outcome(self, item: pytest.Item, info: Any) -> str:
        if info is None:
            return "passed"
        if info.errisinstance(TooLarge):
            return "too large"
        if info.errisinstance(pytest.skip.Exception):
            return "skipped"
        # PyTorch raises NotImplementedError too, of what its operators lack.
        ours = str(info.traceback[-1].path).startswith(_OURS)
        if ours and info.errisinstance(NotImplementedError):
            name = getattr(info.value, "name", None) or str(info.value).split()[0]
            self.refused[name] += 1
            return "refused"
        self.failures.append(f"{item.nodeid}: {info.exconly().splitlines()[0]}")
        return "failed"


def main() -> int:
    """Runs the tests and prints the table."""
    arguments = _arguments()
    source = arguments.source.resolve()
    files = [str(source / file) for file in FILES if (source / file).exists()]
    if not files:
        raise SystemExit(f"{source} has none of {', '.join(FILES)}: give --source a checkout")
    sample = Sample(arguments.cases, arguments.seed, arguments.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (int(arguments.memory * 2**30),) * 2)
    signal.signal(signal.SIGPROF, _too_long)
    sys.dont_write_bytecode = True  # the checkout stays as it is
    quiet = ("-q", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist")
    options = (*quiet, f"--rootdir={source}", "-c", "/dev/null", "--import-mode=importlib")
    options += ("-k", arguments.only) if arguments.only else ()
    begun = time.process_time()
    with modules(source), on_a_cpu():
        code = pytest.main([*options, *files], plugins=[sample])
    ran = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    if code not in ran or not sample.counts:
        return int(code)
    print("\n".join(_report(sample, source, time.process_time() - begun)))
    return 1 if sample.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="a checkout of flash-attn")
    parser.add_argument("--cases", type=int, default=2000, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time of a case, at most")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space, at most")
    parser.add_argument("--only", default="", help="an expression of names, as pytest's -k")
    return parser.parse_args()


def _report(sample: Sample, source: Path, seconds: float) -> Iterator[str]:
    """The lines of the table, in Markdown, and what stands below it."""
    version = ["git", "-C", str(source), "describe", "--tags", "--always", "--long"]
    named = subprocess.run(version, capture_output=True, text=True).stdout.strip() or "unknown"
    yield f"flash-attn {named}; torch {torch.__version__}; {seconds / 60:.0f} min of CPU time\n"
    yield f"| test | cases | {' | '.join(OUTCOMES)} |"
    yield f"| --- | ---: |{' ---: |' * len(OUTCOMES)}"
    total: Counter[str] = Counter()
    for test, counts in sample.counts.items():
        total += counts
        yield _line(f"`{test}`", sample.available[test], counts)
    yield _line("all", sum(sample.available[test] for test in sample.counts), total)
    for name, count in sample.refused.most_common():
        yield f"refused: {name}: {count}"
    for failure in sample.failures:
        yield f"failed: {failure}"


def _line(name: str, available: int, counts: Counter[str]) -> str:
    numbers = [available, *(counts[outcome] for outcome in OUTCOMES)]
    return f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |"


def _test(item: pytest.Item) -> str:
    return str(item.originalname)  # type: ignore[attr-defined]


def _sizes(item: pytest.Item) -> dict[str, int]:
    case = getattr(item, "callspec", None)
    found = {} if case is None else case.params
    return {name: found[name] for name in SIZES if name in found}


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [each.strip() for each in names.split(",")] if isinstance(names, str) else list(names)


def _case(marks: list[pytest.Mark], number: int) -> Iterator[Any]:
    """The values of one case: `number` counts through all of them."""
    for mark in marks:
        number, at = divmod(number, len(mark.args[1]))
        value = mark.args[1][at]
        yield from value if len(_names(mark)) > 1 else [value]


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _too_long(*_: Any) -> None:
    raise TooLarge


if __name__ == "__main__":
    sys.exit(main())
