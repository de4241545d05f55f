"""The first lines of the real data, for the studies in examples/."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import DATA


def few_lines(folder: Path, files: Mapping[str, int]) -> Path:
    """`folder`, with the first lines of each file, so many; skips where one is missing."""
    for name, count in files.items():
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} does not exist: set GPTKERNELS_DATA to a folder with it")
        with (DATA / name).open(encoding="utf-8") as lines:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(itertools.islice(lines, count)), encoding="utf-8")
    return folder
