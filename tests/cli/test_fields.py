"""The fields of dataclasses as options: what each one's help says, and what is said of defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

import click
from test_cli import COMMANDS

from gptkernels.cli.fields import FieldOption, fields_of
from gptkernels.cli.main import commands
from gptkernels.gpt.options import option


def options() -> Iterator[tuple[str, FieldOption]]:
    """Each option that is a field's, under the name of its command."""
    context = click.Context(commands)
    for name in COMMANDS:
        command = commands.get_command(context, name)
        for one in (command, *getattr(command, "commands", {}).values()):
            yield from ((name, p) for p in one.params if isinstance(p, FieldOption))


def test_each_help_is_sentences_and_says_the_default() -> None:
    seen = set()
    for command, one in options():
        seen.add(command)
        text, default, _ = re.fullmatch(r"(.*?)(  \[default: (.+)\])?", one.help, re.S).groups()
        assert re.match("[A-Z]", text), (command, one.name, text)
        assert text.endswith("."), (command, one.name, text)
        assert default, (command, one.name, text)
        assert one.help.isprintable(), (command, one.name)
    assert seen == {"train", "finetune", "evaluate", "prepare", "analyse"}


def test_a_dtype_has_a_short_name() -> None:
    dtypes = [one for _, one in options() if one.name == "dtype"]
    assert dtypes
    for one in dtypes:
        given = ("bf16", "bfloat16", "fp32")
        assert [one.type(name) for name in given] == ["bfloat16", "bfloat16", "float32"]


@dataclasses.dataclass
class Shape:
    """A shape.

    Fields:
        size: Size of it, which is
            said in two lines.
        width: Width.

    Not of it: Width.
    """

    size: int = 3
    width: int | None = None


@dataclasses.dataclass
class Settings:
    """Settings."""

    in_all: int = option(1, "Number of all, more than `at_once`; `other`.")
    at_once: int | None = option(None, "Number at once.", unset="a tenth of all")
    warm: bool = option(True, "Whether it is warm.")
    mark: str = option("\n", "Mark.")
    impl: str = option("auto", "Implementation.")


def helps(kind: type, **how: Any) -> dict[str, str]:
    @click.command()
    @fields_of(kind, **how)
    def command(**given: Any) -> None:
        pass

    return {one.name: one.help for one in command.params}


def test_what_a_help_is_made_of() -> None:
    assert helps(Shape, unset={"width": "the size"}, default={"size": 4}) == {
        "size": "Size of it, which is said in two lines.  [default: 4]",
        "width": "Width.  [default: the size]",
    }
    assert helps(Settings, without=("impl",)) == {
        "in_all": "Number of all, more than --at-once; `other`.  [default: 1]",
        "at_once": "Number at once.  [default: a tenth of all]",
        "warm": "Whether it is warm.  [default: warm]",
        "mark": 'Mark.  [default: "\\n"]',
    }
