"""The command `gptkernels plot`: the curves of several runs in one picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from gptkernels.cli.options import PATH, Choice
from gptkernels.cli.paths import FILE
from gptkernels.gpt.training.curve import AXES, draw_runs
from gptkernels.gpt.training.log import NAME, read


@click.command("plot")
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option(
    "--out",
    type=FILE,
    default=Path("loss.png"),
    show_default=True,
    help="Picture to write: .png, .svg or .pdf.",
)
@click.option(
    "--by",
    type=Choice(tuple(AXES)),
    default="step",
    show_default=True,
    help="What the curves are drawn over; seconds are those of the run, petaflop_s_days its "
    "compute.",
)
@click.option(
    "--metric",
    default="loss",
    show_default=True,
    help="Number of the log that is drawn, such as validation_loss, tokens_per_s or learning_rate. "
    "With loss it is the training loss, pale, and the validation loss.",
)
def command(runs: tuple[Path, ...], out: Path, by: str, metric: str) -> None:
    """Draw the curves of RUNS, folders that `train` or `finetune` wrote, in one picture, to compare
    them. A run that is still going is drawn as far as it is.

    \b
    Example:
        gptkernels plot run other-run --by tokens
    """
    from gptkernels.bench.report.words import listed

    logs = {run: run / NAME for run in runs}
    for run, log in logs.items():
        if not log.is_file():
            raise FileNotFoundError(f"runs: {run} is no folder of a run, it has no {NAME}")
    named = dict(zip(names(runs), map(read, logs.values()), strict=True))
    draw_runs(named, out, by=by, metric=metric)
    click.echo(f"the {metric} of {listed([*named])} is in {out}")


def names(runs: tuple[Path, ...]) -> list[str]:
    """A name for each of the folders, none twice: its own name, behind as many of the folders above
    it as that takes. Raises ValueError where a folder is named twice."""
    parts = [run.resolve().parts for run in runs]
    twice, count = Counter(parts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"runs: {Path(*twice)} is named twice")
    ends = Counter(one[-length:] for one in parts for length in range(1, len(one) + 1))
    own = (next(one[-n:] for n in range(1, len(one) + 1) if ends[one[-n:]] == 1) for one in parts)
    return [str(Path(*one)) for one in own]
