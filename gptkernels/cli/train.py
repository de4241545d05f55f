"""The command `gptkernels train`, most of whose options are the fields of two dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.eval_only import refuse_unread, validate
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH, Choice
from gptkernels.cli.paths import FOLDER
from gptkernels.gpt.config import NAMES, GPTConfig
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.recipes import GPT3, TOKENIZER, recipe_config

if TYPE_CHECKING:
    from gptkernels.gpt.training.train import TrainResult

SHORTER = "--steps or --minutes make it shorter"
RESHAPED = frozenset({"dropout", "block_size"})
"""The fields of a model's shape that a model to go on from may change."""


_SMALL, _LARGE = "mini", "gpt2"  # the shapes of a new model on a CPU and on a GPU


def _by_config(name: str) -> str:
    """What a field is in the two shapes that nobody has to name."""
    return ", ".join(f"{getattr(GPTConfig.named(one), name)} in {one}" for one in (_SMALL, _LARGE))


@click.command("train", cls=FileCommand)
@click.argument("files", type=PATH, nargs=-1)
@click.option(
    "--out", type=FOLDER, help="Folder to write.  [required, but with --eval-only and --init]"
)
@click.option(
    "--config",
    "shape",
    help="Shape of a new model, of which the options below change single fields: mini, a small one "
    f"of bytes, or a published one: {', '.join(NAMES[1:])}.  [default: mini on a CPU, which trains "
    "it in some minutes; gpt2 on a GPU]",
)
@click.option(
    "--recipe",
    type=Choice(list(GPT3)),
    metavar="NAME",
    help=f"Train a new model of GPT-3's shapes as the paper did ({', '.join(GPT3)}): its learning "
    "rate, batch size, schedule, 300 billion tokens and GPT-2's tokenizer. Options that are given "
    "win.",
)
@click.option(
    "--init",
    type=PATH,
    help="Go on from a trained model: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that "
    "`train` wrote, its checkpoint.pt, or a nanoGPT checkpoint.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option(
    "--eval-only",
    is_flag=True,
    help="With --resume or --init, print the validation loss and the perplexity of the model as it "
    "is, and write nothing: on the whole of FILES, or on what a run holds out of its own text.",
)
@fields_of(
    GPTConfig,
    unset={
        **{name: _by_config(name) for name in ("block_size", "n_layer", "n_head", "n_embd")},
        "vocab_size": "the tokenizer's",
        "n_inner": "4 C",
        "window": "all in every block",
    },
)
@fields_of(TrainConfig)
def command(
    files: tuple[Path, ...],
    out: Path | None,
    shape: str | None,
    recipe: str | None,
    init: Path | None,
    resume: bool,
    eval_only: bool,
    **options: Any,
) -> None:
    """Train a GPT on FILES, text, token shards (.bin) or folders that `prepare` wrote, and write a
    folder: log.jsonl, checkpoint.pt, loss.png and model/, which `generate` and Hugging Face's
    transformers read.

    The first options are the model's shape, the later ones how it is trained.

    \b
    Examples:
        gptkernels train book.txt --out run
        gptkernels train book.txt --out run --config gpt2 --dtype bfloat16
        gptkernels train --resume --out run
    """
    from gptkernels.core.device import choose_device
    from gptkernels.gpt.tokenizer import load_tokenizer
    from gptkernels.gpt.training import prepared, train
    from gptkernels.gpt.training.progress import ProgressBar

    given = {name: value for name, value in options.items() if value is not None}
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    sizes = {name: value for name, value in given.items() if name in names}
    training = {name: value for name, value in given.items() if name not in names}
    whole = [name for name, v in dict(config=shape, recipe=recipe, init=init).items() if v]
    _refuse_what_does_not_fit(files, sizes, whole, resume)
    if eval_only:
        if not (resume or init):
            raise ValueError("eval-only: name a run with --resume, or a model with --init")
        refuse_unread(click.get_current_context(), training, out_is_read=resume)
        validate(files, _wanted(out) if resume else None, init, sizes, training)
        return
    out = _wanted(out)
    if resume:
        with _told_how_to_go_on(out), ProgressBar(plain_console(), shorter=SHORTER) as bar:
            result = train.resume(out, files=files or None, observer=bar, **training)
        report(result, out)
        return
    if init:
        go_on(files, out, init, sizes, training)
        return
    train.check_new(out)
    on_cpu = choose_device(training.get("device", "auto")).type == "cpu"
    name = shape or recipe or (_SMALL if on_cpu else _LARGE)
    opening = ""
    if on_cpu and not (shape or recipe):
        opening = f"{name}, the default on a CPU; --config {_LARGE} is a published one"
    model = dataclasses.replace(GPTConfig.named(name), **sizes)
    if recipe:
        config = recipe_config(recipe, model.block_size, **training)
        config = prepared.settled(files, config, TOKENIZER)
        opening = (
            f"{recipe}, trained as the paper says; the learning rate rises to "
            f"{config.rates[0]:.2g}\nin {config.warmup_steps:,} steps"
        )
    else:
        config = prepared.settled(files, TrainConfig(**training))
    if "vocab_size" not in sizes:
        vocab_size = load_tokenizer(config.tokenizer).vocab_size
        model = dataclasses.replace(model, vocab_size=vocab_size)
    with _told_how_to_go_on(out), ProgressBar(plain_console(), opening, SHORTER) as bar:
        result = train.train(files, out, model=model, config=config, observer=bar)
    report(result, out)


def _wanted(out: Path | None) -> Path:
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    return out


def _refuse_what_does_not_fit(
    files: Sequence[Path], sizes: dict[str, Any], whole: list[str], resume: bool
) -> None:
    """Raise ValueError where options say more, or less, than one model and its text. `sizes`:
    fields of GPTConfig; `whole`: the options that set all of them."""
    if resume:
        if fixed := [*sizes, *whole]:
            raise ValueError(f"{', '.join(fixed)}: a resumed run keeps its model, leave it out")
        return
    if not files:
        raise ValueError("files: name at least one text file or token shard to train on")
    if len(whole) > 1:
        raise ValueError(f"{', '.join(whole)}: each of them sets the model's shape, one is wanted")
    if whole == ["init"] and (fixed := sorted({*sizes} - RESHAPED)):
        raise ValueError(f"{', '.join(fixed)}: a model to go on from keeps its shape, leave it out")


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

    train.check_new(out)
    begun = Pretrained.load(init, training.get("tokenizer", "auto"), **sizes)
    config = begun.settled(TrainConfig(**training))
    opening = ""
    if "learning_rate" not in training:
        opening = (
            f"the learning rate rises to {config.rates[0]:.2g}, a tenth of what GPT-3's paper\n"
            "trains a model of this size with"
        )
    shorter = SHORTER if epochs is None else "fewer --epochs make it shorter"
    with _told_how_to_go_on(out), ProgressBar(plain_console(), opening, shorter) as bar:
        result = train.train(files, out, init=begun, config=config, epochs=epochs, observer=bar)
    report(result, out)


@contextlib.contextmanager
def _told_how_to_go_on(out: Path) -> Iterator[None]:
    """Whoever interrupts the run within is told how to go on, where it wrote a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if not (out / "checkpoint.pt").exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; go on from the last checkpoint with: {_again(out)}"
        ) from None


def _again(out: Path) -> str:
    return f"gptkernels train --resume --out {shlex.quote(str(out))}"


def report(result: TrainResult, out: Path) -> None:
    """Print the last line of a run."""
    console, again = plain_console(), _again(out)
    if result.nothing_left:
        unit = result.nothing_left.split()[-1]  # steps or minutes
        done = f"the run is done: {result.nothing_left}"
        print_text(console, f"{done}; go on with: {again} --{unit} N")
        return
    if result.stopped:
        print_text(console, f"stopped; go on with: {again}")
        return
    print_text(
        console,
        f"best validation loss {result.best_validation_loss:.4f} after "
        f"{result.petaflop_s_days:.3g} petaflop/s-days, everything is in {out}",
    )
