"""The command `gptkernels train`, most of whose options are the fields of two dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.console import plain_console
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.recipes import GPT3, TOKENIZER, recipe_config, size

if TYPE_CHECKING:
    from gptkernels.gpt.training.train import TrainResult

RESHAPED = frozenset({"dropout", "block_size"})
"""The fields of a model's shape that a model to go on from may change."""


@click.command("train", cls=FileCommand)
@click.argument("files", type=PATH, nargs=-1)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--config", "shape", help="Start from a published model's shape, such as gpt2.")
@click.option(
    "--recipe",
    type=click.Choice(list(GPT3)),
    help="Train a new model of GPT-3's shapes as the paper did: its learning rate, batch size, "
    "schedule, 300 billion tokens and GPT-2's tokenizer. Options that are given win.",
)
@click.option(
    "--init",
    type=PATH,
    help="Go on from a trained model: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that "
    "`train` wrote, its checkpoint.pt, or a nanoGPT checkpoint.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@fields_of(
    GPTConfig,
    unset={
        "vocab_size": "the tokenizer's",
        "n_inner": "4 C",
        "window": "all in every block",
    },
)
@fields_of(TrainConfig)
def command(
    files: tuple[Path, ...],
    out: Path,
    shape: str | None,
    recipe: str | None,
    init: Path | None,
    resume: bool,
    **options: Any,
) -> None:
    """Train a GPT on FILES, text, token shards (.bin) or folders that `prepare` wrote, and write a
    folder: log.jsonl, checkpoint.pt, loss.png and model/, which `generate` and Hugging Face's
    transformers read.

    The first options are the model's shape, the later ones how it is trained.
    """
    from gptkernels.gpt.tokenizer import load_tokenizer
    from gptkernels.gpt.training import prepared, train
    from gptkernels.gpt.training.progress import ProgressBar

    given = {name: value for name, value in options.items() if value is not None}
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    sizes = {name: value for name, value in given.items() if name in names}
    training = {name: value for name, value in given.items() if name not in names}
    whole = [name for name, v in dict(config=shape, recipe=recipe, init=init).items() if v]
    if resume:
        if fixed := [*sizes, *whole]:
            raise ValueError(f"{', '.join(fixed)}: a resumed run keeps its model, leave it out")
        with ProgressBar(plain_console()) as bar:
            result = train.resume(out, files=files or None, observer=bar, **training)
        report(result, out)
        return
    if not files:
        raise ValueError("files: name at least one text file or token shard to train on")
    if len(whole) > 1:
        raise ValueError(f"{', '.join(whole)}: each of them sets the model's shape, one is wanted")
    if init:
        if fixed := sorted({*sizes} - RESHAPED):
            raise ValueError(
                f"{', '.join(fixed)}: a model to go on from keeps its shape, leave it out"
            )
        go_on(files, out, init, sizes, training)
        return
    name = shape or recipe
    model = dataclasses.replace(GPTConfig.named(name) if name else GPTConfig(), **sizes)
    if recipe:
        config = recipe_config(recipe, model.block_size, **training)
        config = prepared.settled(files, config, TOKENIZER)
    else:
        config = prepared.settled(files, TrainConfig(**training))
    if "vocab_size" not in sizes:
        vocab_size = load_tokenizer(config.tokenizer).vocab_size
        model = dataclasses.replace(model, vocab_size=vocab_size)
    opening = described(recipe, config, model) if recipe else ""
    with ProgressBar(plain_console(), opening) as bar:
        result = train.train(files, out, model=model, config=config, observer=bar)
    report(result, out)


def go_on(
    files: Sequence[Path],
    out: Path,
    init: Path,
    sizes: dict[str, Any],
    training: dict[str, Any],
    epochs: int | None = None,
) -> None:
    """Go on training the model at `init`, and print what comes of it. `sizes`: those of RESHAPED
    that were given; `training`: fields of TrainConfig; `epochs`: in place of its steps."""
    from gptkernels.gpt.training import train
    from gptkernels.gpt.training.pretrained import Pretrained
    from gptkernels.gpt.training.progress import ProgressBar

    begun = Pretrained.load(init, training.get("tokenizer", "auto"), **sizes)
    config = begun.settled(TrainConfig(**training))
    opening = ""
    if "learning_rate" not in training:
        opening = (
            f"the learning rate rises to {config.rates[0]:.2g}, a tenth of what GPT-3's paper "
            "trains a model of this size with"
        )
    with ProgressBar(plain_console(), opening) as bar:
        result = train.train(files, out, init=begun, config=config, epochs=epochs, observer=bar)
    report(result, out)


def described(recipe: str, config: TrainConfig, model: GPTConfig) -> str:
    """What a recipe came to, in a line."""
    window = config.batch_size * model.block_size
    steps = f"{config.steps:,} steps of {window * config.accumulation:,} tokens"
    if config.ramp_tokens:
        steps = (
            f"{config.steps:,} steps of {window * config.ramp_start:,} tokens at first, "
            f"{window * config.accumulation:,} after {config.ramp_tokens:,}"
        )
    return (
        f"{recipe}: {size(model):,} parameters, a vocabulary of {model.vocab_size:,} (tokenizer "
        f"{config.tokenizer}); {steps}; the learning rate rises to {config.rates[0]:.2g} in "
        f"{config.warmup_steps:,} steps"
    )


def report(result: TrainResult, out: Path) -> None:
    """Print the last line of a run."""
    if result.stopped:
        click.echo(f"stopped; go on with: gptkernels train --resume --out {out}")
        return
    click.echo(
        f"best validation loss {result.best_validation_loss:.4f} after "
        f"{result.petaflop_s_days:.3g} petaflop/s-days, everything is in {out}"
    )
