"""The keys of a task's description, and what each may hold: types alone, of TOML's or JSON's
values. What the values mean is checked in task.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptkernels.gpt.task_files import a, check_keys, list_of, table

_NEEDED = ("transformation", "metrics", "format", "files")


def _bounds(value: Any) -> bool:
    return list_of(int | float)(value) and len(value) == 2


_ZERO_SHOT = {
    "prompt": ("a string", a(str)),
    "answers": ("a list of strings", list_of(str)),
}
_TASK = {
    "transformation": ("a string", a(str)),
    "metrics": ("a list of strings", list_of(str)),
    "format": ("a string", a(str)),
    "texts": ("a list of columns, names or numbers", list_of(str | int)),
    "choices": ("a list of columns, names or numbers", list_of(str | int)),
    "label": ("a column, a name or a number", a(str | int)),
    "folder": ("a string", a(str)),
    "range": ("[lowest, highest]", _bounds),
    "labels": ("a table of strings", table),
    "files": ("a table of strings", table),
    "zero_shot": ("a table", a(dict)),
}


def check(name: str, content: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of the task `name` that is unknown, missing or of a wrong type."""
    check_keys(f"task {name}", content, _TASK, _NEEDED)
    check_keys(f"task {name}: zero_shot", content.get("zero_shot", {}), _ZERO_SHOT)
