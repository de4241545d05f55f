"""The fields of a dataclass as the options of a command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

import click

from gptkernels.cli.options import IMPLS

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def fields_of(
    kind: type, default: dict[str, str] | None = None, without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds an option for each field of a dataclass, `without` some; None means
    "not given"."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # Decorators are applied from the last to the first.
        for field in reversed(dataclasses.fields(kind)):
            if field.name in without:
                continue
            shown = (default or {}).get(field.name, field.default)
            text = field.metadata.get("help") or _documented(kind, field.name)
            text += "" if shown is None else f"  [default: {shown}]"
            function = _field_option(field, text)(function)
        return function

    return decorate


def _field_option(field: dataclasses.Field[Any], text: str) -> Callable[..., Any]:
    name = field.name.replace("_", "-")
    if field.type == "bool":
        return click.option(f"--{name}/--no-{name}", default=None, help=text)
    kind = _TYPES[str(field.type).removesuffix(" | None")]
    if field.name == "impl":
        kind = click.Choice(IMPLS)
    return click.option(f"--{name}", field.name, type=kind, default=None, help=text)


def _documented(kind: type, name: str) -> str:
    """What a class's docstring says of a field, in the line "name: ..."."""
    found = re.search(rf"^ +{name}: (.+)$", kind.__doc__ or "", re.MULTILINE)
    return found[1].rstrip(".") if found else ""
