"""The command `gptkernels classify`: a fine-tuned model's answers to texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from gptkernels.cli import options
from gptkernels.cli.finetune import cut_sentence


def _lines() -> list[str]:
    """Those of standard input. Raises ValueError for a blank one: each line gets an answer."""
    if sys.stdin.isatty():
        raise ValueError("texts: name at least one, or pipe lines in")
    lines = sys.stdin.read().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"texts: line {number} of the input is blank")
    return lines


@click.command("classify")
@click.argument("folder", type=options.PATH)
@click.argument("texts", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@options.impl
@options.device
def command(folder: Path, texts: tuple[str, ...], as_json: bool, impl: str, device: str) -> None:
    """Answer TEXTS with the model in FOLDER, which `finetune` wrote: the label, or the number, and
    how probable the label is, a line an example.

    For a task about one text each of TEXTS is an example. For a task about two, or about choices,
    TEXTS are one example: its texts, then its choices. Without TEXTS every line of standard input
    is an example, with tabs between its texts.

    \b
    Examples:
        gptkernels classify tuned "a film of rare warmth"
        gptkernels classify tuned --json < reviews.txt
    """
    from gptkernels.gpt.finetuning.classifier import Classifier

    classify = Classifier(folder, impl=impl, device=device)
    if not texts:
        examples = [line.rstrip("\r\n").split("\t") for line in _lines()]
    elif classify.texts == 1 and not classify.task.choice:
        examples = [[text] for text in texts]
    else:
        examples = [list(texts)]
    if not examples:
        raise ValueError("texts: there is none to answer, neither as an argument nor as input")
    for one in classify(examples):
        likely = max(one.probabilities, default=None)
        if as_json:
            names = classify.task.classes or tuple(map(str, range(len(one.probabilities))))
            record: dict[str, object] = {"answer": one.label}
            if classify.task.range is not None:
                record["answer"] = one.value
            else:
                record["probabilities"] = dict(zip(names, one.probabilities, strict=True))
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            click.echo(one.label if likely is None else f"{one.label}\t{likely:.4f}")
    if classify.encoder.truncated:
        click.echo(cut_sentence(classify.encoder.truncated, classify.encoder.length), err=True)
