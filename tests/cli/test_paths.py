"""What commands write: a path that cannot be written is refused before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")

import click
from test_cli import COMMANDS, assert_refused

from gptkernels.cli import paths
from gptkernels.cli.main import commands

WRITTEN = {"out", "json", "report"}


def outputs() -> Iterator[tuple[list[str], click.Option]]:
    """Each option for a path that is written, behind the words of its command."""
    context = click.Context(commands)
    for name in COMMANDS:
        command = commands.get_command(context, name)
        assert command is not None
        for words, one in (
            ([name], command),
            *(([name, sub], inner) for sub, inner in getattr(command, "commands", {}).items()),
        ):
            for option in one.params:
                name = option.opts[0].lstrip("-")
                if name in WRITTEN and not getattr(option, "is_flag", False):
                    yield words, option


OUTPUTS = list(outputs())


def test_each_command_that_writes_is_among_them() -> None:
    names = {words[0] for words, _ in OUTPUTS}
    reads_only = {"info", "generate", "classify"}
    assert names == {*COMMANDS} - reads_only


@pytest.mark.parametrize(("words", "option"), OUTPUTS)
def test_what_cannot_be_written_is_refused(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], option: Any
) -> None:
    assert option.type in (paths.FILE, paths.FOLDER)
    name = option.opts[0].lstrip("-")
    file = tmp_path / "file"
    file.touch()
    wrong = {
        file / "a": f"{name} must be a folder, but {file} is a file",
        file / "a" / "b": f"{name} must be a folder, but {file} is a file",
    }
    if option.type is paths.FOLDER:
        wrong[file] = f"{name} must be a folder, but {file} is a file"
    else:
        wrong[tmp_path] = f"{name}: {tmp_path} is a folder, a file is wanted"
    for path, sentence in wrong.items():
        refused = call(*words, option.opts[0], path)
        assert_refused(refused, sentence)
        assert refused.out == ""
        assert ".tmp" not in refused.err
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    refused = call(*words, option.opts[0], tmp_path / "a" / "new")
    assert_refused(refused, f"{name}: {tmp_path} is a folder that may not be written")
    assert list(tmp_path.iterdir()) == [file]
