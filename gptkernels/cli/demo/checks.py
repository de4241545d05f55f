"""How the demo's checks ended: how many passed, failed and were skipped, and of what kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptkernels.bench.report.words import count
from gptkernels.cli.demo.terminal import Row
from gptkernels.cli.named import grouped


@dataclass(frozen=True)
class Checks:
    """The count of all checks; `skips` has a line for each reason why some were skipped."""

    passed: int
    failed: int
    skipped: int
    skips: list[str]

    @classmethod
    def of(cls, checked: Iterable[Row], timed: Iterable[Row]) -> Checks:
        """Of rows with a `status`; a time that failed, for an error or a wrong result, counts."""
        checked = list(checked)
        statuses = [row["status"] for row in checked]
        failed = statuses.count("fail") + sum(bool(row.get("failed")) for row in timed)
        skipped = [row for row in checked if row["status"] == "skipped"]
        return cls(statuses.count("pass"), failed, len(skipped), list(grouped(skipped, "reason")))

    @property
    def verdict(self) -> str:
        """What failed, or else what passed."""
        if self.failed:
            return f"{count(self.failed, 'check')} FAILED"
        return f"{count(self.passed, 'check')} passed"

    def __str__(self) -> str:
        passed = f", {self.passed:,} passed" if self.failed else ""
        return self.verdict + passed + (f", {self.skipped:,} skipped" if self.skipped else "")
