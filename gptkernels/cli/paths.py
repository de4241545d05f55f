"""Paths that a command writes: what cannot be written is refused before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gptkernels.core.files import check_file, check_folder


class _Written(click.Path):
    """A path, held to a check of `gptkernels.core.files` under the name of its option."""

    def __init__(self, check: Callable[[str, Path], None]) -> None:
        super().__init__(path_type=Path)
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises OSError, in one sentence, where it cannot be written."""
        path: Any = super().convert(value, param, ctx)  # made a Path
        self._check(param.opts[0].lstrip("-") if param else "path", path)
        return path


FILE = _Written(check_file)
FOLDER = _Written(check_folder)
"""Types of options; a folder above that is missing is made later, where it is written."""
