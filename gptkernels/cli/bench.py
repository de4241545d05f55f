"""The command `gptkernels bench`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptkernels.cli import bench_table as table
from gptkernels.cli import named, options
from gptkernels.cli.console import STYLES, plain_console, print_text, room
from gptkernels.cli.paths import FOLDER

_MINUTES_ON_A_GPU = 8.0


@click.command("bench")
@options.ops("gpt_training", "gpt_generate", "gpt_first_token")
@options.impls
@options.dtypes("those that matter for each")
@click.option("--shape", "shapes", multiple=True, help="Only shapes that hold this text, such as "
              "T1024 or C768; may be repeated.")  # fmt: skip
@click.option("--peers", "peers", multiple=True, help="Only peers that hold this text, such as "
              "SDPA or compile; may be repeated. With none, plain PyTorch alone.")  # fmt: skip
@options.device
@click.option("--quick", is_flag=True, help="One or two shapes of each op, within two minutes on "
              "two cores.")  # fmt: skip
@click.option("--full", is_flag=True, help="Every shape and peer, and larger models.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Minutes after "
              "which nothing is begun.  [default: no limit; 8 with --full on a GPU]")  # fmt: skip
@named.allow_skip
@options.json
@click.option("--resume", is_flag=True, help="Go on with the file of --json: what it has is not "
              "measured again.")  # fmt: skip
@click.option("--report", "folder", type=FOLDER, metavar="DIR", help="Write a page with "
              "plots into this folder.")  # fmt: skip
@click.option("--compare", "old", type=options.PATH, metavar="OLD.json", help="Exit with 1 where "
              "one of our implementations is slower than in this file.")  # fmt: skip
def command(
    ops: tuple[str, ...],
    impls: tuple[str, ...],
    dtypes: tuple[str, ...],
    shapes: tuple[str, ...],
    peers: tuple[str, ...],
    device: str,
    quick: bool,
    full: bool,
    minutes: float | None,
    allow_skip: bool,
    path: Path | None,
    resume: bool,
    folder: Path | None,
    old: Path | None,
) -> int:
    """Time the operators and whole GPTs beside plain PyTorch and the best others.

    All candidates of a case get the same tensors and take turns. "spread" is half of the interval
    that holds the true median with 95% (of three samples with 75%). "PyTorch" and "best" say how
    many times as fast a candidate is as plain PyTorch, and as the fastest of all others. "ceiling"
    is the share that it reaches of what this machine was measured to do; "error" that of its limit
    against fp64.

    Every case is written to the file of --json as it is measured.

    What cannot run on this machine is skipped. But of each combination of what --impl, --op and
    --dtype name, at least one row has to run. The exit code is 1 where one does not, where one of
    our implementations fails or is wrong, where an installed peer does not import, and where
    --compare finds something slower.

    \b
    Examples:
        gptkernels bench --quick --report page
        gptkernels bench --op attention --impl cpu --dtype bf16 --shape T1024
        gptkernels bench --json new.json --compare old.json
    """
    import torch

    from gptkernels import bench
    from gptkernels.bench import regressions, report, results, run
    from gptkernels.core.choice import IMPLEMENTATIONS, automatic, check_impl
    from gptkernels.core.device import choose_device

    where = choose_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # where kernels and peers run that look at no tensor
    for impl in impls:
        check_impl(impl, auto=False)
    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    if resume and path is None:
        raise ValueError("--resume goes on with a file, which --json names")
    if folder is not None:
        report.check(folder)
    before = None if old is None else results.read(old)
    level = "quick" if quick else "full" if full else "default"
    if full and where.type == "cuda" and minutes is None:
        minutes = _MINUTES_ON_A_GPU
    wanted = run.wanted_peers(peers, level)
    steps = bench.steps(
        tuple(dict.fromkeys(ops)) or bench.OPERATORS + bench.MODELS,
        where,
        level,
        dtypes=list(dict.fromkeys(map(options.dtype, dtypes))) or None,
        shapes=shapes,
    )
    if path is not None and not resume:
        results.refuse_unfinished(path)
    asked = named.names(impls, ops, dtypes)
    found = results.Results(path, resume=resume)
    impls = impls or IMPLEMENTATIONS
    console = plain_console()
    with console.status("measuring what this machine can do"):
        about = run.head(where, [step.dtype for step in steps])
    found.begin(level=level, device=where.type, **about)
    for line in table.head(found.content):
        print_text(console, line)
    if found.rows:
        print_text(console, f"\n{path} has {len(found.rows)} rows, which are not measured again")

    going_on = f"--json {shlex.quote(str(path))} --resume"
    how: dict[str, Any] = {"device": where, "impls": impls, "peers": wanted, "level": level}
    try:
        _show(console, run.run(steps, found, minutes=minutes, **how), len(steps))
    except KeyboardInterrupt:
        if path is not None:
            print_text(console, f"\nstopped; {going_on} goes on")
        raise
    for line in table.foot(found.rows, room(console)):
        print_text(console, line)
    if not found.content["finished"]:
        how_on = f"{going_on} goes on" if path else "with --json a run can go on"
        print_text(console, f"\n{minutes:g} minutes are over; {how_on}")
    if folder is not None and found.rows:
        print_text(console, f"\nReport: {report.write(found.content, folder)}")
    broken = [p for p in found.content["peers"] if p["status"] == "broken" and wanted(p["name"])]
    failed = bool(broken) or any(row.get("failed") for row in found.rows)
    if found.content["finished"] and not allow_skip:
        # Of a whole model "auto" stands for what it takes here.
        stands = {"auto": automatic(where.type)}
        rows = [{**row, "impl": stands.get(row["impl"], row["impl"])} for row in found.rows]
        for line in named.missing(asked, rows, _skipped):
            print_text(console, f"\n{line} (--allow-skip lets it pass)", STYLES["fail"])
            failed = True
    if before is None:
        return int(failed)
    if not regressions.compared(before["rows"], found.rows):
        raise ValueError(f"{old} and this run have no row in common, so nothing is compared")
    slower = list(regressions.found(before["rows"], found.rows))
    again = run.again(steps, slower, **how)
    slower = regressions.confirmed(slower, before["rows"], again)
    for line in table.regressions(before, found.content, slower):
        print_text(console, line)
    return int(failed or bool(slower))


def _skipped(row: dict[str, Any]) -> str | None:
    ran = row["time_s"] is not None or row.get("failed")
    return None if ran else row["skipped"]


def _show(console: Console, done: Iterator[tuple[Any, list[Any]]], count: int) -> None:
    """Prints each case as it comes, over a bar of the steps on a terminal."""
    step = None
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=count)
        for now, rows in done:
            if now is not step and step is not None:
                progress.advance(bar)
            step = now
            progress.update(bar, description=f"{now.op} {now.shape}")
            for line in table.case(rows, room(console)) if rows else ():
                print_text(console, line)
