"""Each command explains itself, with the names that the package really has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

import click

from gptkernels import bench
from gptkernels.cli import bench as bench_command
from gptkernels.cli import main, options
from gptkernels.core.choice import IMPLEMENTATIONS
from gptkernels.truth import verify


def _commands(group: click.Group, name: str = "gptkernels") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for each in group.list_commands(context):
        found = group.get_command(context, each)
        assert found is not None
        if isinstance(found, click.Group):
            yield from _commands(found, f"{name} {each}")
        else:
            yield f"{name} {each}", found


@pytest.mark.parametrize("found", list(_commands(main.commands)), ids=lambda found: found[0])
def test_helps_explain(found: tuple[str, click.Command]) -> None:
    """Each option by a sentence, each argument by its name, each command by an example."""
    name, command = found
    text = command.help or ""
    assert f"    {name}" in text.split("Example")[1]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            said = re.sub(r"  [\[(].*", "", parameter.help or "")
            assert said[:1].isupper() or said.startswith("--"), parameter.name
            assert said.endswith("."), parameter.name
        elif not parameter.metavar:
            assert str(parameter.name).upper() in text.split("Example")[0]


def test_exit_codes_are_said(call: Any) -> None:
    shown = call("--help").out
    for code in ("0", "1", "2", "130", "141"):
        assert f"\n  {code:<5}" in shown


def test_options_know_what_the_package_has() -> None:
    """The names that help texts have, which are shown without importing PyTorch."""
    assert ("auto", *IMPLEMENTATIONS) == options.IMPLS
    assert set(options.OPS) == set(bench.OPERATORS) == set(verify.OPS)
    shown = {one.name: one.help or "" for one in bench_command.command.params if one.name == "ops"}
    assert all(name in shown["ops"] for name in (*bench.OPERATORS, *bench.MODELS))
    assert {options.dtype(name) for name in options.DTYPE_NAMES} == set(verify.DTYPES)
