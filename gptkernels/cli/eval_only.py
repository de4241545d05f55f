"""`gptkernels train --eval-only`: the validation loss of the model as it is, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from gptkernels.gpt.training.validation import Validation


_READ = {"batch_size", "validation_batches", "compile", "device", "dtype", "impl"}
_READ |= {"tokenizer", "token_dtype"}
"""The fields of TrainConfig that a validation reads."""


def refuse_unread(context: click.Context, training: Collection[str], out_is_read: bool) -> None:
    """Raise ValueError where the command line gives what a validation would not read. `training`:
    the fields of TrainConfig that were given; a file of options may hold them all."""
    unread = set(training) - _READ
    if not out_is_read:
        unread.add("out")
    line = ParameterSource.COMMANDLINE
    given = sorted(name for name in unread if context.get_parameter_source(name) == line)
    if given:
        raise ValueError(f"{', '.join(given)}: without effect with eval-only, leave it out")


def validate(
    files: Sequence[Path],
    out: Path | None,
    init: Path | None,
    sizes: dict[str, Any],
    training: dict[str, Any],
) -> None:
    """Print the validation loss of the model at `init`, or of the run in `out`. `sizes`: fields of
    a model's shape that were given; `training`: fields of TrainConfig."""
    from gptkernels.gpt.training import validation
    from gptkernels.gpt.training.config import TrainConfig
    from gptkernels.gpt.training.pretrained import Pretrained

    if init is None:
        found = validation.validate_run(str(out), files or None, **training)
    else:
        begun = Pretrained.load(init, training.get("tokenizer", "auto"), **sizes)
        found = validation.validate_model(begun, files, TrainConfig(**training))
    text = "the held-out end of its text" if found.held_out else ", ".join(map(str, files))
    click.echo(_line("" if found.step is None else f"step {found.step:,}: ", found))
    if found.ema_loss is not None:
        click.echo(f"average of the weights: validation loss {found.ema_loss:.4f}")
    some = " (more with --validation-batches)" if found.tokens < found.room else ""
    click.echo(f"on {found.tokens:,} of the {found.room:,} tokens of {text}{some}")


def _line(before: str, found: Validation) -> str:
    return f"{before}validation loss {found.loss:.4f}, perplexity {found.perplexity:.4g}"
