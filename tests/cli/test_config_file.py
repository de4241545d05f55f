"""Options of a command in a file: what is printed runs the same, and what is wrong is refused."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("tomlkit")

import click
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import assert_refused

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.main import commands

NAMES = ("train", "finetune", "evaluate", "prepare")
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
NUMBERS = {click.INT: st.integers(), click.FLOAT: st.floats(allow_nan=False)}


def command_of(name: str) -> FileCommand:
    command = commands.get_command(click.Context(commands), name)
    assert isinstance(command, FileCommand)
    return command


def values(one: click.Parameter) -> st.SearchStrategy[list[str]]:
    """Command lines that give one parameter."""
    if isinstance(one.type, click.Choice):
        texts = st.sampled_from(list(one.type.choices))
    else:
        texts = NUMBERS.get(one.type, TEXTS).map(str)
    if isinstance(one, click.Argument):
        names = texts.filter(lambda text: not text.startswith("-"))
        return st.lists(names, min_size=1, max_size=1 if one.nargs == 1 else 3)
    if one.is_flag:
        return st.sampled_from([*one.opts, *one.secondary_opts]).map(lambda flag: [flag])
    line = texts.map(lambda text: [f"{one.opts[0]}={text}"])
    if one.multiple:
        return st.lists(line, min_size=1, max_size=2).map(lambda lines: list(chain(*lines)))
    return line


@st.composite
def lines(draw: Any) -> tuple[str, list[str]]:
    """A command and a command line of it, with all that it requires."""
    name = draw(st.sampled_from(NAMES))
    ours = [one for one in command_of(name).params if one.expose_value]
    required = [one for one in ours if one.required]
    others = draw(st.lists(st.sampled_from(ours), unique_by=id, max_size=6))
    return name, list(chain(*(draw(values(one)) for one in {*required, *others})))


@settings(max_examples=30, deadline=None, database=None)
@given(line=lines())
def test_what_is_printed_runs_the_same(tmp_path_factory: Any, line: tuple[str, list[str]]) -> None:
    name, given_options = line
    command = command_of(name)
    runner = CliRunner()
    printed = runner.invoke(command, [*given_options, "--dump-config"])
    assert printed.exit_code == 0, printed.output
    file = tmp_path_factory.mktemp("config") / "some.toml"
    file.write_bytes(printed.stdout_bytes)
    read = ["--config-file", str(file)]
    params = [command.make_context(name, [*line]).params for line in (read, given_options)]
    assert params[0] == params[1]
    assert runner.invoke(command, [*read, "--dump-config"]).stdout_bytes == printed.stdout_bytes


def test_all_options_are_printed_with_their_helps_and_defaults(call: Any) -> None:
    for name in NAMES:
        shown = call(name, "--dump-config").out
        for one in command_of(name).params:
            key = max(one.opts, key=len).removeprefix("--")
            if one.expose_value and isinstance(one, click.Option):
                assert f"\n#{key} = " in shown, (name, key)
                assert one.help.split()[0] in shown
        assert max(map(len, shown.splitlines())) <= 100
        assert tomllib.loads(shown) == {}
    shown = call("train", "a.txt", "--dump-config", "--steps", "7").out
    assert '\nfiles = ["a.txt"]\n' in shown
    assert "\n# Optimiser steps of the whole run. [default: 2000]\nsteps = 7\n" in shown
    assert "\n# Windows of text in a micro-batch. [default: 16]\n#batch-size = 16\n" in shown


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `prepare` was called with."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(command_of("prepare"), "callback", lambda **given: calls.append(given))
    return calls


def test_the_command_line_wins(call: Any, tmp_path: Path, seen: list[dict[str, Any]]) -> None:
    file = tmp_path / "prepare.toml"
    file.write_text('files = ["a", "b"]\nout = "here"\nshard_tokens = 5\nmin-score = 1\n')
    assert call("prepare", "--config-file", file).code == 0
    given = ("c", "--shard-tokens", "6", "--out", "there")
    assert call("prepare", *given, "--config-file", file).code == 0
    for key, first, second in (
        ("files", (Path("a"), Path("b")), (Path("c"),)),
        ("out", Path("here"), Path("there")),
        ("shard_tokens", 5, 6),
        ("min_score", 1.0, 1.0),
        ("text_key", None, None),
    ):
        assert [one[key] for one in seen] == [first, second]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shard-token = 5", "shard-token is no option of prepare; did you mean 'shard-tokens'?"),
        ("x = 5", "x is no option of prepare\n"),
        ("config-file = 'a'", "config-file is no option of prepare"),
        ("shard-tokens = 5\nshard_tokens = 5", "shard-tokens stands there twice, with dashes and"),
        ("shard-tokens = 2.7", "shard-tokens is 2.7, a whole number is wanted"),
        ("shard_tokens = true", "shard_tokens is True, a whole number is wanted"),
        ("min-score = '3'", "min-score is '3', a number is wanted"),
        ("text-key = 3", "text-key is 3, a text is wanted"),
        ("files = 'a'", "files is 'a', a list of texts is wanted"),
        ("files = ['a', 3]", "files is ['a', 3], a list of texts is wanted"),
        ("[out]\nx = 1", "out is {'x': 1}, a text is wanted"),
        ("out = ", "prepare.toml is not TOML (Invalid value"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused(
    call: Any, tmp_path: Path, seen: list[dict[str, Any]], text: str, sentence: str
) -> None:
    file = tmp_path / "prepare.toml"
    file.write_text(text)
    refused = call("prepare", "--config-file", file, "--out", tmp_path / "out")
    assert_refused(refused, str(file), sentence)
    assert seen == []


def test_flags_must_be_true_or_false(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("compile = 'yes'\n")
    assert_refused(
        call("train", "--config-file", file), "compile is 'yes', true or false is wanted"
    )
    missing = tmp_path / "nothing.toml"
    assert_refused(call("train", "--config-file", missing), f"{missing} does not exist")


def test_what_is_required_is_so_unless_it_is_printed_or_in_the_file(
    call: Any, tmp_path: Path, seen: list[dict[str, Any]]
) -> None:
    assert_refused(call("prepare", "a"), "Missing option '--out'")
    assert_refused(call("prepare", "--", "--dump-config"), "Missing option '--out'")
    assert call("prepare", "a", "--dump-config").code == 0
    assert_refused(call("prepare", "a"), "Missing option '--out'")  # again
    (tmp_path / "prepare.toml").write_text("out = 'out'\n")
    assert call("prepare", "a", "--config-file", tmp_path / "prepare.toml").code == 0
    assert len(seen) == 1
