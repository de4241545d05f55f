"""Tasks as TOML files: those that come with the package, or of a user's own by their path; what
their keys may hold; and where their data is."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from gptkernels.core.names import check_name

Kind = type | UnionType
Known = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Key -> what it holds, in words and as a condition."""


def names(own: Path) -> tuple[str, ...]:
    """The tasks in the package's folder `own`."""
    return tuple(sorted(path.stem for path in own.glob("*.toml")))


def read(own: Path, name: str | Path) -> tuple[str, dict[str, Any]]:
    """The name and the content of the task called `name` in the folder `own`, or of the TOML file
    at this path.

    Raises ValueError for an unknown name and for a file that is not TOML, FileNotFoundError for a
    path that is not there.
    """
    path = Path(name)
    if path.suffix != ".toml":
        check_name("task", str(name), names(own), ", or the path of a .toml file")
        path = own / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(f"task: {path} does not exist")
    try:
        return path.stem, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"task: {path} is not TOML ({error})") from None


def data_folder(data: str | Path | None, folder: str, first: str) -> Path:
    """The folder of a task's files: `data`, or `folder` in the one that the environment variable
    GPTKERNELS_DATA names. `first`: a file that it has to hold.

    Raises FileNotFoundError where neither says, and where the folder does not exist.
    """
    home = os.environ.get("GPTKERNELS_DATA")
    if data is None and not home:
        raise FileNotFoundError(
            f"data: name the folder that holds {first}, or set GPTKERNELS_DATA "
            f"to one that holds {folder or 'it'}"
        )
    found = Path(data) if data is not None else Path(home or "") / folder
    if not found.is_dir():
        raise FileNotFoundError(f"data: {found} is not a folder")
    # The folder of all data, in place of the task's own, is an easy mistake.
    inside = found / folder
    if folder and any(inside.glob(f"{first}*")) and not any(found.glob(f"{first}*")):
        raise FileNotFoundError(f"data: {found} does not hold {first}, but {inside} does")
    return found


def check_keys(
    where: str, content: Mapping[str, Any], known: Known, needed: Collection[str] = ()
) -> None:
    """Raise ValueError for a key that is unknown or of a wrong type, and for one that is needed and
    missing."""
    if strange := sorted(content.keys() - known.keys()):
        raise ValueError(f"{where}: {', '.join(strange)} is not known there")
    for key, value in content.items():
        wanted, is_right = known[key]
        if not is_right(value):
            raise ValueError(f"{where}: {key} must be {wanted}, got {value!r}")
    if missing := sorted(set(needed) - content.keys()):
        raise ValueError(f"{where}: {', '.join(missing)} is missing")


def a(kind: Kind) -> Callable[[Any], bool]:
    """Whether a value is a `kind`; a bool is no number."""
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def list_of(kind: Kind) -> Callable[[Any], bool]:
    """Whether a value is a list of them."""
    return lambda value: isinstance(value, list | tuple) and all(map(a(kind), value))


def table(value: Any) -> bool:
    """Whether a value is a table of strings."""
    return isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values())
