"""Options as the fields of a frozen dataclass: each with a help text, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from dataclasses import field
from typing import Any

from gptkernels.core.names import hint

DEVICE = "Device: auto (a GPU if there is one), cpu, cuda or cuda:N."
IMPL = "Implementation of the fused operations: auto, torch, triton, cuda or cpu."


def option(default: Any, text: str, least: float | None = None, *, unset: str | None = None) -> Any:
    """A field with a default value, a help text and, for a number, the least that it may be.

    The text is made of sentences that stand alone, and names other fields in backticks. `unset`
    says what the default None comes to.
    """
    return field(default=default, metadata={"help": text, "least": least, "unset": unset})


def check_options(options: Any) -> None:
    """Raise TypeError for a value that is not of its field's annotation, ValueError for a number
    that is not finite or less than the least."""
    for one in dataclasses.fields(options):
        _check_type(one.name, str(one.type), getattr(options, one.name))
        least, value = one.metadata["least"], getattr(options, one.name)
        if least is not None and value is not None:
            check_option(options, one.name, value >= least, f"at least {least}")


def check_option(options: Any, name: str, right: bool, wanted: str) -> None:
    """Raise ValueError about the field `name` where it is not `right`."""
    if not right:
        raise ValueError(f"{name} is {getattr(options, name)!r}, {wanted} is wanted")


def check_choice(options: Any, name: str, known: Collection[str]) -> None:
    """Raise ValueError about the field `name` where it is neither None nor one of those `known`."""
    value = getattr(options, name)
    if value is not None and value not in known:
        raise ValueError(f"{name} is {value!r}, {one_of(known)} is wanted{hint(value, known)}")


def one_of(names: Iterable[str]) -> str:
    """ "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _check_type(name: str, wanted: str, value: Any) -> None:
    """`wanted` is the field's annotation: "int", "float", "str", "bool" or "float | None"."""
    if value is None and wanted.endswith("| None"):
        return
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    wrong_bool = isinstance(value, bool) and wanted != "bool"
    if wrong_bool or not isinstance(value, kinds[wanted.removesuffix(" | None")]):
        raise TypeError(f"{name} is {value!r}, {wanted} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, a finite number is wanted")
