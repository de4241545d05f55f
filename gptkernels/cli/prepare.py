"""The command `gptkernels prepare`, whose options are the fields of a dataclass."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptkernels.cli.config_file import FileCommand
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.fields import fields_of
from gptkernels.cli.options import PATH
from gptkernels.cli.paths import FOLDER
from gptkernels.gpt.corpus.config import PrepareConfig

if TYPE_CHECKING:
    from gptkernels.gpt.corpus.manifest import Manifest

_NAMED = 3  # malformed pages


@click.command("prepare", cls=FileCommand)
@click.argument("files", type=PATH, nargs=-1)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option(
    "--processes", type=int, help="Processes that work at a time.  [default: one for each core]"
)
@fields_of(PrepareConfig)
def command(files: tuple[Path, ...], out: Path, processes: int | None, **options: Any) -> int:
    """Make token shards of FILES, or of the files in folders, for `gptkernels train`: texts (.txt,
    .md), JSON lines (.jsonl), pages (.html) and WARC archives (.warc), also compressed (.gz, .zst).

    Where the command was stopped or killed, the same command goes on.

    \b
    Examples:
        gptkernels prepare pages/ --out corpus
        gptkernels prepare book.txt --out corpus --tokenizer bytes
    """
    from gptkernels.gpt.corpus import manifest as manifests
    from gptkernels.gpt.corpus.prepare import MALFORMED, prepare
    from gptkernels.gpt.corpus.progress import ProgressBar

    given = {name: value for name, value in options.items() if value is not None}
    console = plain_console()
    before = (out / manifests.NAME).exists()
    try:
        with ProgressBar(console) as bar:
            config = PrepareConfig(**given)
            manifest = prepare(files, out, config=config, processes=processes, observer=bar)
    except KeyboardInterrupt:
        click.echo("stopped; go on with the same command", err=True)
        return 130
    for line in _summary(manifest, out / MALFORMED):
        print_text(console, line)
    was = "was finished before, and stays as it is" if before else "is finished"
    train = f"gptkernels train {shlex.quote(str(out))} --out RUN"
    print_text(console, f"{out} {was}; train on it: {train}")
    return 0


def _summary(manifest: Manifest, malformed: Path) -> Iterator[str]:
    counts = manifest.counts
    records = f"{_count(counts['records'], 'record')} in {_count(counts['files'], 'file')}"
    yield f"{records}, {counts['scored']:,} with a score"
    for reason, count in manifest.dropped.items():
        yield f"  {count:,} left out: {reason}"
    if counts["malformed"]:
        yield f"  {counts['malformed']:,} malformed, all named in {malformed}:"
        with malformed.open(encoding="utf-8") as lines:
            for page in map(json.loads, itertools.islice(lines, _NAMED)):
                yield f"    {page['name']} {page['reason']}"
    yield f"  {counts['kept']:,} kept: {_count(counts['documents'], 'document')}"
    shards = _count(len(manifest.shards), "shard")
    yield f"{_count(counts['tokens'], 'token')} of {manifest.tokenizer} in {shards}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
