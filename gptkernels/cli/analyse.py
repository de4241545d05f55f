"""The commands `gptkernels analyse layers`, `zero-shot` and `ablations`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH, tokenizer_option
from gptkernels.cli.paths import FOLDER
from gptkernels.cli.table import Column, print_table
from gptkernels.gpt.finetuning.analyses.snapshots import ZeroShotConfig
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.task import names
from gptkernels.gpt.training.observer import Watcher

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group("analyse")
def command() -> None:
    """The analyses of GPT-1's paper (Radford et al. 2018, section 5), each a folder with a JSON
    file and a figure.

    An analysis that was interrupted goes on when the same command is run again.
    """


def _seeds(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers, such as 1,2,3") from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _with(*decorators: Decorator) -> Decorator:
    """All of them, the first one outermost."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_common = _with(
    click.option(
        "--task",
        "tasks",
        multiple=True,
        required=True,
        help=f"Task: {', '.join(names())}, or a .toml file that describes one; may be repeated.",
    ),
    click.option(
        "--data",
        type=PATH,
        help="Folder that holds the tasks' folders.  [default: the one that GPTKERNELS_DATA names]",
    ),
    click.option("--out", type=FOLDER, required=True, help="Folder to write."),
    tokenizer_option,
)
_model = click.argument("model", type=PATH)
_seed_option = click.option(
    "--seeds", default="1,2,3", show_default=True, callback=_seeds, help="Seeds, a run for each."
)


@command.command("layers")
@_with(_model, _common, _seed_option, fields_of(FinetuneConfig, without=("seed", "transfer")))
def layers_command(tasks: tuple[str, ...], out: Path, **options: Any) -> None:
    """Fine-tune MODEL with nothing of it, with its embeddings, and with each block more: figure 2
    (left) of the paper.

    Writes layers.json and layers.png. MODEL and the options are those of `finetune`.

    \b
    Example:
        gptkernels analyse layers run --task sst-2 --data data/ --out layers
    """
    from gptkernels.gpt.finetuning.analyses.layers import layers
    from gptkernels.gpt.finetuning.analyses.spread import summarise

    _fine_tune(layers, summarise, tasks, out, options)


@command.command("ablations")
@_with(_model, _common, _seed_option, fields_of(FinetuneConfig, without=("seed",)))
def ablations_command(tasks: tuple[str, ...], out: Path, **options: Any) -> None:
    """Fine-tune MODEL in full, without the auxiliary loss and without pre-training: table 5 of the
    paper.

    Writes ablations.json and ablations.png. MODEL and the options are those of `finetune`.

    \b
    Example:
        gptkernels analyse ablations run --task sst-2 --data data/ --out out
    """
    from gptkernels.gpt.finetuning.analyses.ablations import ablations, summary

    _fine_tune(ablations, summary, tasks, out, options)


@command.command("zero-shot")
@_with(click.argument("models", type=PATH, nargs=-1, required=True), _common)
@fields_of(ZeroShotConfig)
def zero_shot_command(
    models: tuple[Path, ...],
    tasks: tuple[str, ...],
    data: Path | None,
    out: Path,
    tokenizer: str | None,
    **options: Any,
) -> None:
    """Ask language models about tasks that they were not fine-tuned on: figure 2 (right) of the
    paper.

    MODELS is the folder of a run of `train --snapshot-interval`, or folders of models that are
    named by their steps. Writes zero_shot.json and zero_shot.png.

    \b
    Example:
        gptkernels analyse zero-shot run --task sst-2 --data data/ --out out
    """
    from gptkernels.gpt.finetuning.analyses.snapshots import zero_shot

    records = zero_shot(
        models, out, tasks=tasks, data=data, tokenizer=tokenizer,
        config=ZeroShotConfig(**_given(options)),
        observer=_Lines(),
    )  # fmt: skip
    cut = sum(record["truncated"] for record in records)
    if cut:
        click.echo(f"texts that were too long lost their beginnings, {cut} times")
    click.echo(f"everything is in {out}")


def _fine_tune(
    analyse: Callable[..., Any],
    summarised: Callable[..., Any],
    tasks: tuple[str, ...],
    out: Path,
    options: dict[str, Any],
) -> None:
    from gptkernels.gpt.finetuning.analyses.spread import metrics_of

    own = {name: options.pop(name) for name in ("model", "data", "tokenizer", "seeds")}
    config = FinetuneConfig(**_given(options))
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"task: each may be named once, got {', '.join(tasks)}")
    study = analyse(out=out, tasks=dict.fromkeys(tasks, config), observer=_Lines(), **own)
    if study.stopped:
        click.echo(f"stopped; the same command goes on with what is in {out}")
        return
    for task, count in {r["task"]: r["examples"]["truncated"] for r in study.records}.items():
        if count:
            click.echo(f"{task}: {count:,} examples of a run were too long for the model, and cut")
    found = summarised(study.records)
    for task, metric in metrics_of(study.records).items():
        columns = (Column(metric), Column("mean ± deviation", right=True))
        print_table(plain_console(), columns, [(v, str(of[task])) for v, of in found.items()])
    click.echo(f"everything is in {out}")


class _Lines(Watcher):
    """A line for each epoch, each run, and each model that was asked."""

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """Print the line of `record`, if it is one of these; `done` is the share behind us."""
        if "share" in record:
            text = f"step {record['step']}, {record['task']}: accuracy "
            text += f"{record['metrics']['accuracy']:.4f}, chance {record['chance']:.4f}"
        elif "score" in record:
            text = f"{record['task']}, {record['variant']}, seed {record['config']['seed']}: "
            text += f"{record['part']} {record['metric']} {record['score']:.4f}"
        elif "epoch" in record:
            text = f"{record['task']}, {record['variant']}, seed {record['seed']}, "
            text += f"epoch {record['epoch']}"
            for name, value in record.items():
                if name.startswith("validation_"):
                    text += f", {name.replace('_', ' ')} {value:.4f}"
        else:
            return
        print_text(plain_console(), f"{done:4.0%}  {text}")

    def stopping(self) -> None:
        """Say that the signal was heard."""
        click.echo("stopping after this step; once more stops now", err=True)
