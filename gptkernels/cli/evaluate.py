"""The command `gptkernels evaluate`: the perplexity of texts, or a task asked by prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH, tokenizer_option
from gptkernels.cli.paths import FOLDER
from gptkernels.cli.table import Column, print_table
from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig, TextConfig
from gptkernels.gpt.evaluation.task import names

if TYPE_CHECKING:
    from gptkernels.gpt.evaluation.evaluate import Evaluation, Outcome
    from gptkernels.gpt.evaluation.subject import Subject

_OF_TEXTS = (
    Column("text"),
    Column("tokens", right=True, lost=3),
    Column("words", right=True, lost=1),
    Column("bytes", right=True, lost=2),
    Column("per token", right=True),
    Column("per word", right=True, lost=4),
    Column("bits/byte", right=True),
)


@click.command("evaluate", cls=FileCommand)
@click.argument("model", type=PATH)
@click.argument("texts", type=PATH, nargs=-1)
@click.option("--task", help=f"Task: {', '.join(names())}, or a .toml file that describes one.")
@click.option(
    "--data",
    type=PATH,
    help="Folder of the task's files.  [default: the task's own, in the folder that "
    "GPTKERNELS_DATA names]",
)
@click.option(
    "--out", type=FOLDER, help="Folder to write: results.json, and of a task its answers."
)
@tokenizer_option
@fields_of(TextConfig)
@fields_of(TaskConfig)
@fields_of(RunConfig)
def command(
    model: Path,
    texts: tuple[Path, ...],
    task: str | None,
    data: Path | None,
    out: Path | None,
    tokenizer: str | None,
    **options: Any,
) -> None:
    """Evaluate MODEL: the perplexity of TEXTS, or a --task that it does by its prompt alone, with
    no solved example (zero-shot) or some (--shots).

    MODEL is a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train` wrote, its
    checkpoint.pt, or a nanoGPT checkpoint.

    \b
    Examples:
        gptkernels evaluate run wiki.txt --stride 512
        gptkernels evaluate run --task sst-2 --data sst-2/ --shots 0,1,4
    """
    if bool(texts) == bool(task):
        raise ValueError("either texts or a --task is wanted")
    given = {name: value for name, value in options.items() if value is not None}
    if data is not None:
        given["data"] = data
    of_task, of_texts = (_names(kind) for kind in (TaskConfig, TextConfig))
    for name in given.keys() & (of_texts if task else of_task | {"data"}):
        other = "texts" if task else "a task"
        raise ValueError(f"{name}: it is for {other}, leave it out")
    given.pop("data", None)
    run = RunConfig(**_take(given, RunConfig))
    from gptkernels.gpt.evaluation import folder

    how = TaskConfig(**_take(given, TaskConfig))
    if out is not None:
        folder.check_new(out, plot=len(how.counts) > 1)
    if task:
        _evaluate_task(model, task, data, out, tokenizer, how, run)
    else:
        _evaluate_texts(model, texts, out, tokenizer, TextConfig(**_take(given, TextConfig)), run)
    if out is not None:
        click.echo(f"everything is in {out}")


def _evaluate_texts(
    model: Path,
    files: tuple[Path, ...],
    out: Path | None,
    tokenizer: str | None,
    config: TextConfig,
    run: RunConfig,
) -> None:
    from gptkernels.gpt.evaluation import folder
    from gptkernels.gpt.evaluation.subject import Subject
    from gptkernels.gpt.evaluation.texts import evaluate_texts, total
    from gptkernels.gpt.progress import Bar

    console = plain_console()
    with Bar(console) as bar:
        subject = Subject.load(model, tokenizer=tokenizer, run=run)
        found = evaluate_texts(subject, files, config=config, observer=bar.show)
    named = [(text.path.name, text.perplexity) for text in found]
    if len(found) > 1:
        named.append(("all", total(found)))
    rows = [
        (
            name, f"{one.tokens:,}", f"{one.words:,}", f"{one.bytes:,}",
            f"{one.per_token:.4g}", f"{one.per_word:.4g}", f"{one.bits_per_byte:.4f}",
        )
        for name, one in named
    ]  # fmt: skip
    print_table(console, _OF_TEXTS, rows)
    if unpredicted := total(found).unpredicted:
        first = "the first token of each text" if len(found) > 1 else "the first token"
        print_text(
            console,
            f"{first} ({unpredicted:,}) was not predicted: the tokenizer has no end of text to "
            "predict it from",
        )
    if any(text.changed for text in found):
        print_text(
            console,
            "the tokenizer changes texts (capitals, spaces ...): these figures are of the changed "
            "ones, and those of other tokenizers cannot be compared with them",
        )
    if kept := sum(text.kept for text in found):
        print_text(
            console, f"{kept:,} lines stayed as they are: no detokeniser could be undone there"
        )
    if out is not None:
        settings = {"config": dataclasses.asdict(config), "run": dataclasses.asdict(run)}
        folder.write_texts(out, found, {"model": model.name, **settings})


def _evaluate_task(
    model: Path,
    name: str,
    data: Path | None,
    out: Path | None,
    tokenizer: str | None,
    config: TaskConfig,
    run: RunConfig,
) -> None:
    from gptkernels.gpt.evaluation import folder
    from gptkernels.gpt.evaluation.evaluate import evaluate
    from gptkernels.gpt.evaluation.subject import Subject
    from gptkernels.gpt.evaluation.task import load_task
    from gptkernels.gpt.progress import Bar

    console = plain_console()
    with Bar(console) as bar:
        task = load_task(name)
        subject = Subject.load(model, tokenizer=tokenizer, run=run)
        found = evaluate(subject, task, data=data, config=config, observer=bar.show)
    _print_task(console, found, subject)
    if out is not None:
        folder.write_task(out, found, run, model.name)


def _print_task(console: Console, found: Evaluation, subject: Subject) -> None:
    outcomes = found.outcomes
    said = f"{found.task.name}, {found.split} part, {_count(len(found.asked), 'example')}"
    if found.chance is not None:
        said += f"; guessing {found.chance:.4f}"
    if found.majority is not None:
        said += f", always the most frequent answer {found.majority:.4f}"
    print_text(console, said)
    if found.unjoined:
        print_text(console, f"the detokeniser left {_count(found.unjoined, 'line')} as it stood")
    columns = [Column("shots")]
    for name in outcomes[0].metrics:
        columns += [Column(name, right=True), Column("95% interval", right=True, lost=1)]
    print_table(console, columns, [(str(one.shots), *_figures(one)) for one in outcomes])
    lost = "the beginning" if found.task.cut is None else f"the end of {found.task.cut}"
    for outcome in outcomes:
        of = f"with {_count(outcome.shots, 'shot')}, " if len(outcomes) > 1 else ""
        if outcome.cut:
            print_text(
                console,
                f"{of}{_count(outcome.cut, 'question')} longer than the context of "
                f"{subject.length:,} tokens lost {lost}",
            )
        if outcome.fewer:
            mean = sum(answer.prompt.shots for answer in outcome.answers) / len(outcome.answers)
            print_text(
                console,
                f"{of}{_count(outcome.fewer, 'prompt')} had room for fewer solved examples, "
                f"{mean:.1f} on average",
            )
    if reused := sum(outcome.counts.reused_tokens for outcome in outcomes):
        computed = sum(outcome.counts.prefix_tokens for outcome in outcomes)
        print_text(
            console,
            f"{computed:,} tokens of prompts computed; {reused:,} more were taken from the cache",
        )


def _figures(outcome: Outcome) -> Iterator[str]:
    """Each metric, and its interval."""
    for name, value in outcome.metrics.items():
        low, high = outcome.intervals[name]
        yield f"{value:#.4g}"
        yield f"{low:#.4g} to {high:#.4g}"


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _take(given: dict[str, Any], kind: type) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in _names(kind)}


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
