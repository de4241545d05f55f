"""Commands whose options may stand in a file: `--config-file` reads it, `--dump-config` prints it.

The file is TOML: the command's options by their long names, with dashes or underscores, and its
arguments by theirs. What the command line gives wins. Paths are relative to the current folder, as
on the command line, so that a line of the file means what the same option means there.
"""

from __future__ import annotations

import copy
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gptkernels.cli.fields import FieldOption
from gptkernels.cli.options import PATH
from gptkernels.core.names import hint
from gptkernels.core.optional import optional

_OWN = ("config_file", "dump_config", "help")
_COLUMNS = 100
_HEAD = (
    "Options of `gptkernels {name} --config-file FILE`, as on the command line, which wins. "
    "Relative paths begin at the folder that the command runs in. Options that are not given stand "
    "behind a #, with their defaults or types."
)


class FileCommand(click.Command):
    """A command with the options --config-file and --dump-config."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.params += [
            click.Option(
                ["--config-file"],
                type=PATH,
                is_eager=True,
                expose_value=False,
                callback=_take_file,
                help="TOML file with options of this command by their names, and its arguments. "
                "The command line wins.",
            ),
            click.Option(
                ["--dump-config"],
                is_flag=True,
                expose_value=False,
                help="Print all options as such a file, those that are not given as comments, and "
                "exit.",
            ),
        ]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters; where they are only printed, none of them is required."""
        params = super().get_params(ctx)
        return [_optional(one) for one in params] if ctx.meta.get(__name__) else params

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse them as click does, and print them where --dump-config is among them."""
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[__name__] = "dump_config" in given
        rest = super().parse_args(ctx, args)
        if ctx.meta[__name__]:
            click.echo("\n".join(_dumped(self, ctx)))
            ctx.exit()
        return rest


def _optional(parameter: click.Parameter) -> click.Parameter:
    other = copy.copy(parameter)
    other.required = False
    return other


def _key(parameter: click.Parameter) -> str:
    """The name that a parameter has in a file."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len).removeprefix("--")
    return str(parameter.name)


def _known(command: click.Command) -> dict[str, click.Parameter]:
    return {_key(one): one for one in command.params if one.name not in _OWN}


# ---- reading


def _take_file(context: click.Context, option: click.Parameter, file: Path | None) -> None:
    """Make what the file says the defaults of all other parameters."""
    if file is None:
        return
    if not file.is_file():
        raise FileNotFoundError(f"config-file: {file} does not exist")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config-file: {file} is not TOML ({error})") from None
    known = _known(context.command)
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name not in known:
            raise ValueError(
                f"{file}: {key} is no option of {context.command.name}{hint(name, known)}"
            )
        parameter = known[name]
        if parameter.name in found:
            raise ValueError(f"{file}: {name} stands there twice, with dashes and with underscores")
        if wanted := _refused(parameter, value):
            raise ValueError(f"{file}: {key} is {value!r}, {wanted} is wanted")
        found[str(parameter.name)] = value
    context.default_map = found


def _refused(parameter: click.Parameter, value: Any) -> str | None:
    """What is wanted in place of `value`, None where that is right. click itself would take 2.7 for
    a whole number, and any number for a text."""
    wanted, plural, kinds = _kind(parameter)
    if not _takes_several(parameter):
        return None if _is(value, kinds) else wanted
    right = isinstance(value, list) and all(_is(one, kinds) for one in value)
    return None if right else f"a list of {plural}"


def _takes_several(parameter: click.Parameter) -> bool:
    return parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs == -1


def _kind(parameter: click.Parameter) -> tuple[str, str, tuple[type, ...]]:
    if isinstance(parameter.type, click.types.BoolParamType):
        return "true or false", "true or false", (bool,)
    if isinstance(parameter.type, click.types.IntParamType):
        return "a whole number", "whole numbers", (int,)
    if isinstance(parameter.type, click.types.FloatParamType):
        return "a number", "numbers", (int, float)
    return "a text", "texts", (str,)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (kinds == (bool,) or not isinstance(value, bool))


# ---- printing


def _dumped(command: click.Command, context: click.Context) -> Iterator[str]:
    """The lines of a file that runs what this command line would run."""
    yield from _comment(_HEAD.format(name=command.name))
    for key, one in _known(command).items():
        name, default = str(one.name), click.core.ParameterSource.DEFAULT
        value = context.params[name]
        is_given = context.get_parameter_source(name) != default
        if isinstance(one, FieldOption) and not is_given:
            value = one.standard
        shown = _form(one, context) if value in (None, ()) else _toml(value)
        yield ""
        if isinstance(one, click.Option):
            yield from _comment(" ".join((one.help or "").split()))
        yield f"{'' if is_given else '#'}{key} = {shown}"


def _form(parameter: click.Parameter, context: click.Context) -> str:
    """What stands for a value that nobody gave and that has no default: its type."""
    name = parameter.type.get_metavar(parameter, context) or parameter.type.name.upper()
    return f"[{name}, ...]" if _takes_several(parameter) else name


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, _COLUMNS - 2))


def _toml(value: Any) -> str:
    tomlkit = optional("tomlkit", "--dump-config needs tomlkit: pip install 'gptkernels[cli]'")
    item: str = tomlkit.item(_plain(value)).as_string()
    return item


def _plain(value: Any) -> Any:
    """`value` as TOML has it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
