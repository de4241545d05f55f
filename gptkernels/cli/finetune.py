"""The command `gptkernels finetune`, most of whose options are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH, tokenizer_option
from gptkernels.cli.paths import FOLDER
from gptkernels.cli.train import go_on
from gptkernels.gpt.finetuning.config import FinetuneConfig
from gptkernels.gpt.finetuning.task import names
from gptkernels.gpt.progress import Bar
from gptkernels.gpt.training.config import TrainConfig
from gptkernels.gpt.training.observer import Watcher


@click.command("finetune", cls=FileCommand)
@click.argument("model", type=PATH)
@click.option(
    "--task",
    help=f"Task: {', '.join(names())}, or a .toml file that describes one.",
)
@click.option(
    "--lm",
    "texts",
    type=PATH,
    multiple=True,
    help="In place of a task: text, token shards (.bin) or a folder that `prepare` wrote, to go on "
    "training the language model on; may be repeated. The defaults are then those of `train`.",
)
@click.option(
    "--data",
    type=PATH,
    help="Folder of the task's files.  [default: the task's own, in the folder that "
    "GPTKERNELS_DATA names]",
)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@tokenizer_option
@fields_of(FinetuneConfig)
def command(
    model: Path,
    task: str | None,
    texts: tuple[Path, ...],
    data: Path | None,
    out: Path,
    tokenizer: str | None,
    **options: Any,
) -> None:
    """Fine-tune MODEL on a task, as GPT-1's paper does, and write a folder: log.jsonl, model/,
    predictions.tsv and results.json. Or, with --lm, on a text, as `train --init` does, and write
    the folder that `train` writes.

    MODEL is a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train` wrote, its
    checkpoint.pt, or a nanoGPT checkpoint. The defaults are the paper's; a small model learns
    faster with a higher --learning-rate, such as 3e-4.

    \b
    Examples:
        gptkernels finetune run --task sst-2 --data sst-2/ --out tuned
        gptkernels finetune gpt2-folder --lm book.txt --out mine
    """
    from gptkernels.gpt.finetuning.finetune import finetune

    given = {name: value for name, value in options.items() if value is not None}
    if texts and not task:
        more = {"tokenizer": tokenizer, "data": data}
        _train_on(texts, model, out, given | {k: v for k, v in more.items() if v is not None})
        return
    if texts or not task:
        raise ValueError("task, lm: exactly one of the two is wanted")
    console = plain_console()
    with ProgressBar(console) as bar:
        result = finetune(
            model, out, task=task, data=data, tokenizer=tokenizer, config=FinetuneConfig(**given),
            observer=bar,
        )  # fmt: skip
    part = "test" if result.test else "validation"
    if result.truncated:
        print_text(console, cut_sentence(result.truncated, result.model.body.config.block_size))
    for name, value in (result.test or result.validation).items():
        always = f", that of a constant answer {result.majority[name]:.4f}"
        print_text(console, f"{part} {name} {value:.4f}{'' if result.stopped else always}")
    stopped = "stopped; the best model so far is" if result.stopped else "everything is"
    ask = f"gptkernels classify {shlex.quote(str(out))} TEXT"
    print_text(console, f"{stopped} in {out}; ask it with: {ask}")


def _train_on(texts: tuple[Path, ...], model: Path, out: Path, given: dict[str, Any]) -> None:
    """Go on training `model` on `texts`; of the options that were `given`, those of a task alone
    are refused."""
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    alone = sorted(given.keys() - shared - {"dropout", "epochs"})
    if alone:
        raise ValueError(f"{', '.join(alone)}: of a task alone, leave it out with --lm")
    training, sizes, passes = (
        {name: given[name] for name in given.keys() & names}
        for names in (shared, {"dropout"}, {"epochs"})
    )
    go_on(texts, out, model, sizes, training, FinetuneConfig(**passes).epochs)


def cut_sentence(count: int, length: int) -> str:
    """That `count` examples did not fit into `length` tokens."""
    examples = "example was" if count == 1 else "examples were"
    return f"{count:,} {examples} longer than {length:,} tokens, and cut"


class ProgressBar(Bar, Watcher):
    """A progress bar for `finetune(..., observer=...)`, and a line after each epoch."""

    def __call__(self, record: dict[str, Any], done: float) -> None:
        """Show `record`, a line of log.jsonl; `done` is the share of the run behind us."""
        figures = f"loss {record['loss']:.4f}" if "loss" in record else None
        self.show(f"step {record['step']:,}", done, figures)
        if "epoch" in record:
            metrics = "  ".join(
                f"{name.replace('_', ' ')} {value:.4f}"
                for name, value in record.items()
                if name.startswith("validation_")
            )
            print_text(self.console, f"epoch {record['epoch']}  {metrics}")

    def stopping(self) -> None:
        """Say that the signal was heard."""
        self.interject("stopping after this step; once more stops now")
