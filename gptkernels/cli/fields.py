"""The fields of a dataclass as the options of a command."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

from gptkernels.cli.options import IMPLS, Choice, Dtype

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


class FieldOption(click.Option):
    """The option of a field, None where it is not given; `standard` is what the field then is, None
    where that depends on other things."""

    def __init__(self, *args: Any, standard: Any, **more: Any) -> None:
        super().__init__(*args, default=None, **more)
        self.standard = standard


def fields_of(
    kind: type,
    *,
    default: Mapping[str, Any] | None = None,
    unset: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds a FieldOption for each field of a dataclass, `without` some.

    default: the command's own defaults, by field. unset: what it means that a field is not given,
    in words, where the field does not say so itself.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        # Decorators are applied from the last to the first.
        for field in reversed(dataclasses.fields(kind)):
            if field.name in without:
                continue
            words = (unset or {}).get(field.name) or field.metadata.get("unset")
            standard = None if words else (default or {}).get(field.name, field.default)
            shown = words or _shown(field.name, standard)
            text = field.metadata.get("help") or _documented(kind, field.name)
            text = f"{text}  [default: {shown}]" if shown else text
            function = _field_option(field, _by_options(text, names), standard)(function)
        return function

    return decorate


def _field_option(field: dataclasses.Field[Any], text: str, standard: Any) -> Callable[..., Any]:
    name = field.name.replace("_", "-")
    more: dict[str, Any] = dict(cls=FieldOption, help=text, standard=standard)
    if field.type == "bool":
        return click.option(f"--{name}/--no-{name}", field.name, **more)
    kind = _TYPES[str(field.type).removesuffix(" | None")]
    if field.name == "impl":
        kind = Choice(IMPLS)
    elif field.name == "dtype":
        kind = Dtype()
    return click.option(f"--{name}", field.name, type=kind, **more)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return ("" if value else "no-") + name.replace("_", "-")
    if isinstance(value, str) and not (value and value.isprintable()):
        return json.dumps(value)  # a line break would leave a hole in the help
    return str(value)


def _by_options(text: str, names: Collection[str]) -> str:
    """`text` with the options of fields that it names, in backticks, in place of these."""

    def option(found: re.Match[str]) -> str:
        return "--" + found[1].replace("_", "-") if found[1] in names else found[0]

    return re.sub(r"`(\w+)`", option, text)


def _documented(kind: type, name: str) -> str:
    """What a class's docstring says of a field: the item "name: ...", to its last line."""
    item = rf"^( +){name}: (.+(?:\n\1 +.+)*)$"
    found = re.search(item, inspect.getdoc(kind) or "", re.MULTILINE)
    return re.sub(r"\s+", " ", found[2]) if found else ""
