"""What is asked for by name has to run: a check that checks nothing must not pass.

`verify` and `bench` try everything unless told otherwise, and what cannot run here is skipped. But
of each combination of what --impl, --op and --dtype name, at least one row has to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from gptkernels.cli import options

Row = dict[str, Any]

allow_skip = click.option(
    "--allow-skip",
    is_flag=True,
    help="Do not fail where something that --impl, --op or --dtype names cannot run here.",
)


def names(
    impls: Iterable[str], ops: Iterable[str], dtypes: Iterable[str]
) -> dict[str, Sequence[str]]:
    """What the options name, each once, by the key that rows have it under."""
    long = (str(options.dtype(name)).removeprefix("torch.") for name in dtypes)
    found = {"impl": tuple(impls), "op": tuple(ops), "dtype": tuple(long)}
    return {key: tuple(dict.fromkeys(values)) for key, values in found.items() if values}


def missing(
    named: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
    skipped: Callable[[Row], str | None],
) -> Iterator[str]:
    """What was `named` and has no row that ran, a sentence for each reason; `skipped` says why a
    row did not run, None of one that did."""
    found: dict[str, list[str]] = {}
    for words in itertools.product(*named.values()) if named else ():
        wanted = dict(zip(named, words, strict=True))
        reasons = [skipped(row) for row in rows if wanted.items() <= row.items()]
        if None not in reasons:
            why = "; ".join(dict.fromkeys(map(str, reasons))) or "there is no such case"
            found.setdefault(why, []).append(" ".join(words))
    for why, what in found.items():
        yield f"{', '.join(what)} did not run, though asked for by name: {why}"


def grouped(rows: Iterable[Row], reason: str) -> Iterator[str]:
    """Rows that did not run: a line for each reason, which stands under the key `reason`, with how
    many they are of each implementation. Rows without one are left out."""
    reasons: dict[str, dict[str, int]] = {}
    for row in rows:
        if not row.get(reason):
            continue
        counts = reasons.setdefault(row[reason], {})
        counts[row["impl"]] = counts.get(row["impl"], 0) + 1
    for why, counts in reasons.items():
        yield f"{', '.join(f'{count} of {name}' for name, count in counts.items())}: {why}"
