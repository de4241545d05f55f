"""A pytest plugin: each test's outcome as JSON, as it comes, and a share of the tests on demand.

`pytest -p benchmarks.record --record FILE --share 2/4 ...`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--record FILE` and `--share K/N`."""
    parser.addoption("--record", metavar="FILE", help="write every test's outcome there, as JSON")
    parser.addoption("--share", metavar="K/N", help="run every N-th test, from the K-th on")


def pytest_configure(config: pytest.Config) -> None:
    """Starts recording when `--record` is given."""
    path = config.getoption("--record")
    if path:
        config.pluginmanager.register(_Recorder(Path(path)), "gptkernels-recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the share that was asked for, in order."""
    share = config.getoption("--share")
    if share:
        first, step = (int(number) for number in share.split("/"))
        items[:] = items[first - 1 :: step]


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment(), "finished": False, "rows": []}
        write_json(path, self.content)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # pytest reports setup, call and teardown; setup and teardown matter only when they fail.
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }
        if report.outcome == "failed":
            row["reason"] = report.longreprtext
        elif isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2]
        self.content["rows"].append(row)
        write_json(self.path, self.content)

    def pytest_sessionfinish(self) -> None:
        self.content["finished"] = True
        write_json(self.path, self.content)
