"""`gptkernels train --eval-only`: the validation loss of the model as it is, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gptkernels.gpt.training.validation import Validation


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
    click.echo(_line("" if found.step is None else f"step {found.step}: ", found))
    if found.ema_loss is not None:
        click.echo(f"average of the weights: validation loss {found.ema_loss:.4f}")
    some = " (more with --validation-batches)" if found.tokens < found.room else ""
    click.echo(f"on {found.tokens:,} of the {found.room:,} tokens of {text}{some}")


def _line(before: str, found: Validation) -> str:
    return f"{before}validation loss {found.loss:.4f}, perplexity {found.perplexity:.4g}"
