"""Templates: texts with fields in braces, "Question: {question}", as Python's str.format has them,
of plain names and column numbers alone; "{{" stands for a brace."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

from gptkernels.gpt.rows import Column


@dataclass(frozen=True)
class Template:
    """A text with fields. Raises ValueError, in one sentence, where it is none."""

    text: str

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"{self.text!r} is no template ({error})") from None
        for _, field, spec, conversion in parts:
            if field is not None and (not field or spec or conversion or set(field) & set(".[]")):
                raise ValueError(
                    f"{self.text!r} is no template (a field is the name of a column in braces)"
                )

    @property
    def fields(self) -> tuple[Column, ...]:
        """The columns it names; a field of digits is a column's number."""
        return tuple(
            _column(field) for _, field, _, _ in string.Formatter().parse(self.text) if field
        )

    def fill(self, value: Callable[[Column], str]) -> str:
        """The text, with `value(column)` in place of each field."""
        text = ""
        for literal, field, _, _ in string.Formatter().parse(self.text):
            text += literal
            if field:
                text += value(_column(field))
        return text

    def behind(self, field: Column) -> Template:
        """What stands behind this field, which the template has once."""
        parts = list(string.Formatter().parse(self.text))
        place = [_column(part[1]) if part[1] else None for part in parts].index(field)
        rest = ""
        for literal, name, _, _ in parts[place + 1 :]:
            rest += literal.replace("{", "{{").replace("}", "}}") + (f"{{{name}}}" if name else "")
        return Template(rest)


def _column(field: str) -> Column:
    return int(field) if field.isascii() and field.isdigit() else field
