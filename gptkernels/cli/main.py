"""The program `gptkernels`: its commands, and how they end.

Each command is `command` in the module of its name, which is imported when the command is asked
for, so that `gptkernels --help` is quick. What a user has to mend is one sentence on stderr.
"""

from __future__ import annotations

import importlib
import io
import linecache
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import gptkernels
from gptkernels.cli.options import question

_SUMMARIES = {
    "info": "What is installed, what can run here, and what is missing.",
    "verify": "Compare every operator with its formulas in fp64: the parity table.",
    "bench": "Time the operators against plain PyTorch.",
    "tune": 'Measure what is the fastest here; impl="auto" then takes it.',
    "demo": "Train a small GPT on real text, check it, time it, write a report.",
    "prepare": "Make token shards of texts, JSON lines, HTML pages and WARC archives.",
    "overlap": "Say how much of evaluation texts a prepared corpus holds.",
    "train": "Train a GPT on text files or token shards.",
    "plot": "Draw the loss curves of several runs in one picture.",
    "generate": "Continue a text with a trained model.",
    "evaluate": "Perplexity of texts, and tasks asked by prompts: zero-shot, few-shot.",
    "finetune": "Fine-tune a trained model on a task: sentiment, entailment, choices ...",
    "classify": "Answer texts with a fine-tuned model.",
    "analyse": "The analyses of GPT-1's paper: blocks transferred, zero-shot, ablations.",
}

_CODES = {
    "0": "Success.",
    "1": "A check failed, or what was asked for by name could not run.",
    "2": "Bad input, or a package that is missing; one sentence says what.",
    "130": "Interrupted.",
    "141": "Nobody reads the output any more.",
}


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write characters that the terminal cannot show.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = commands.main(arguments, prog_name="gptkernels", standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", code=130)
    except ImportError as error:
        if (error.name or "").split(".")[0] == "gptkernels":
            raise
        _fail(_missing(error))
    except OSError as error:
        _fail(_of_a_file(error))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if not _is_deliberate(error):
            raise
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, code: int = 2) -> None:
    print(f"gptkernels: {sentence}", file=sys.stderr)
    sys.exit(code)


def _of_a_file(error: OSError) -> str:
    """The system's own errors begin with a number, "[Errno 2]"; ours are sentences."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _missing(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    return (
        f"this command needs the package {error.name}, which is missing: pip install {error.name}"
    )


def _is_deliberate(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error; any other error is a bug."""
    frame = error.__traceback__
    if frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "")
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return module.split(".")[0] == "gptkernels" and line.lstrip().startswith("raise")


class _Commands(click.Group):
    """Imports a command when it is asked for.

    When nobody reads a command's output any more, it ends with 141, as SIGPIPE would end it. An
    interrupted command ends with 130, and with what the interrupt says, if it says something.
    """

    def invoke(self, context: click.Context) -> Any:
        # Caught here, because click would exit with 1, which says that a check failed, and would
        # not pass on what an interrupt says.
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            behind = "\n" if sys.stderr.isatty() else ""  # the terminal's ^C
            click.echo(f"{behind}gptkernels: {error or 'interrupted'}", err=True)
            context.exit(130)
        except BrokenPipeError:
            # Python writes what is left in stdout when it exits, and must not fail then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(141)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_SUMMARIES)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # click knows of no names to suggest, since the commands are not imported.
        name = arguments[0]
        if name not in _SUMMARIES and not name.startswith("-"):
            context.fail(f"No such command {name!r}.{question(name, _SUMMARIES)}")
        return super().resolve_command(context, arguments)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _SUMMARIES:
            return None
        return importlib.import_module(f"gptkernels.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import each command for its summary.
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))
        with formatter.section("Exit codes"):
            formatter.write_dl(list(_CODES.items()))


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(gptkernels.__version__, prog_name="gptkernels")
@click.pass_context
def commands(context: click.Context) -> None:
    """Fused attention, LayerNorm, GELU MLP and linear + cross-entropy for PyTorch, and a GPT that
    trains and generates.

    `gptkernels COMMAND --help` has a command's options and examples. Begin with `gptkernels info`,
    which says what can run here, and `gptkernels demo`, which shows the whole in a few minutes.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
