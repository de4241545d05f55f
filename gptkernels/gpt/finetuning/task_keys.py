"""The keys of a task's description, and what each may hold: types alone, of TOML's or JSON's
values. What the values mean is checked in task.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any

_Kind = type | UnionType
_NEEDED = ("transformation", "metrics", "format", "files")


def _a(kind: _Kind) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _list_of(kind: _Kind) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(_a(kind), value))


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values())


def _bounds(value: Any) -> bool:
    return _list_of(int | float)(value) and len(value) == 2


_ZERO_SHOT = {
    "prompt": ("a string", _a(str)),
    "answers": ("a list of strings", _list_of(str)),
}
_TASK = {
    "transformation": ("a string", _a(str)),
    "metrics": ("a list of strings", _list_of(str)),
    "format": ("a string", _a(str)),
    "texts": ("a list of columns, names or numbers", _list_of(str | int)),
    "choices": ("a list of columns, names or numbers", _list_of(str | int)),
    "label": ("a column, a name or a number", _a(str | int)),
    "folder": ("a string", _a(str)),
    "range": ("[lowest, highest]", _bounds),
    "labels": ("a table of strings", _table),
    "files": ("a table of strings", _table),
    "zero_shot": ("a table", _a(dict)),
}


def check(name: str, content: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of the task `name` that is unknown, missing or of a wrong type."""
    _check(f"task {name}", content, _TASK)
    if missing := sorted(set(_NEEDED) - content.keys()):
        raise ValueError(f"task {name}: {', '.join(missing)} is missing")
    _check(f"task {name}: zero_shot", content.get("zero_shot", {}), _ZERO_SHOT)


def _check(
    where: str,
    content: Mapping[str, Any],
    known: Mapping[str, tuple[str, Callable[[Any], bool]]],
) -> None:
    if strange := sorted(content.keys() - known.keys()):
        raise ValueError(f"{where}: {', '.join(strange)} is not known there")
    for key, value in content.items():
        wanted, is_right = known[key]
        if not is_right(value):
            raise ValueError(f"{where}: {key} must be {wanted}, got {value!r}")
