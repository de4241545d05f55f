"""The command `gptkernels overlap`: how much of evaluations a prepared corpus holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from gptkernels.cli import options
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.table import Column, print_table

_COLUMNS = (
    Column("evaluation"),
    Column("8-grams", right=True, lost=1),
    Column("found", right=True, lost=2),
    Column("share", right=True),
    Column("longest", right=True),
)


@click.command("overlap")
@click.argument("folder", type=options.PATH)
@click.argument("evaluations", type=options.PATH, nargs=-1)
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="MiB of the filter that the corpus goes into, part by part, at most.",
)
@click.option(
    "--text-key", default="text", show_default=True, help="Where a line of JSON has its text."
)
@options.json
def command(
    folder: Path, evaluations: tuple[Path, ...], memory: int, text_key: str, path: Path | None
) -> None:
    """Look for the 8-grams of EVALUATIONS, files of text, in the shards that `gptkernels prepare`
    wrote into FOLDER, to see how much a model that is trained on them has seen before.

    \b
    Example:
        gptkernels overlap corpus test.txt
    """
    from gptkernels.bench.results import recorded
    from gptkernels.gpt.corpus import manifest
    from gptkernels.gpt.corpus.documents import texts
    from gptkernels.gpt.corpus.evaluations import evaluation_texts
    from gptkernels.gpt.corpus.overlap import overlap
    from gptkernels.gpt.tokenizer import load_tokenizer

    if not evaluations:
        raise ValueError("evaluations: name at least one file to look for")
    prepared = manifest.read(folder)
    counts, tokenizer = prepared.counts, load_tokenizer(prepared.tokenizer, literal=True)
    # As the corpus is decoded from tokens: GPT-1's are lower-cased and have no accents.
    given = {
        str(file): [
            tokenizer.decode(tokenizer.encode(text)) for text in evaluation_texts(file, text_key)
        ]
        for file in evaluations
    }
    # A word is a letter at least, and so is what divides it from the next.
    words = (counts["characters"] + counts["documents"]) // 2
    found = overlap(texts(folder), words, given, memory=memory << 20)
    rows = ({**dataclasses.asdict(each), "share": each.share} for each in found)
    _print(list(recorded(rows, path)))


def _print(rows: list[dict[str, Any]]) -> None:
    console = plain_console()
    cells = [
        (
            row["name"],
            f"{row['ngrams']:,}",
            f"{row['found']:,}",
            f"{row['share']:.2%}",
            f"{row['longest']:,} words",
        )
        for row in rows
    ]
    print_table(console, _COLUMNS, cells)
    for row in rows:
        if row["found"]:
            print_text(console, f"the longest of {row['name']} begins: {row['example']}")
