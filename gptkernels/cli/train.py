"""The command `gptkernels train`, most of whose options are the fields of two dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from gptkernels.cli.console import plain_console
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.training.config import TrainConfig


@click.command("train")
@click.argument("files", type=PATH, nargs=-1)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--config", "shape", help="Start from a published model's shape, such as gpt2.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@fields_of(GPTConfig, default={"vocab_size": "the tokenizer's"})
@fields_of(TrainConfig)
def command(
    files: tuple[Path, ...], out: Path, shape: str | None, resume: bool, **options: Any
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
    with ProgressBar(plain_console()) as bar:
        if resume:
            if sizes or shape:
                fixed = ", ".join(sizes) or "config"
                raise ValueError(f"{fixed}: a resumed run keeps its model's shape, leave it out")
            result = train.resume(out, files=files or None, observer=bar, **training)
        else:
            if not files:
                raise ValueError("files: name at least one text file or token shard to train on")
            config = prepared.settled(files, TrainConfig(**training))
            sizes.setdefault("vocab_size", load_tokenizer(config.tokenizer).vocab_size)
            published = GPTConfig.named(shape) if shape else GPTConfig()
            model = dataclasses.replace(published, **sizes)
            result = train.train(files, out, model=model, config=config, observer=bar)
    if result.stopped:
        click.echo(f"stopped; go on with: gptkernels train --resume --out {out}")
        return
    click.echo(f"best validation loss {result.best_validation_loss:.4f}, everything is in {out}")
