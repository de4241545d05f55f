"""Types of argparse's arguments, for the scripts of a checkout: paths that a script writes.

What cannot be written is refused before any work is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from gptkernels.core.files import check_file, check_folder


def new_file(text: str) -> Path:
    """A file to write. Raises ArgumentTypeError, in one sentence, where that cannot be."""
    return _checked(check_file, "the file", text)


def new_folder(text: str) -> Path:
    """A folder to write. Raises ArgumentTypeError, in one sentence, where that cannot be."""
    return _checked(check_folder, "the folder", text)


def _checked(check: Callable[[str, Path], None], name: str, text: str) -> Path:
    path = Path(text)
    try:
        check(name, path)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
