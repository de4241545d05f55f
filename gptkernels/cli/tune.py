"""The command `gptkernels tune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gptkernels.cli import options, tune_table
from gptkernels.cli.console import plain_console, print_text
from gptkernels.cli.paths import FILE

if TYPE_CHECKING:
    from gptkernels.tuning.recording import Classes

_LOG_EVERY_S = 15.0


@click.command("tune", context_settings={"show_default": True})
@click.argument("folder", type=options.PATH, required=False)
@click.option("--config", "shape", help="Published model's shape, such as gpt2, in place of "
              "FOLDER.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=8, help="Texts at a time.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of a text.  [default: the "
              "model's block_size, half of it with --generate]", show_default=False)  # fmt: skip
@click.option("--dtype", default="bfloat16", help=f"Dtype of the computation: "
              f"{', '.join(options.DTYPE_NAMES)}.")  # fmt: skip
@click.option("--train/--generate", default=True, help="Measure the calls of a training step, or "
              "those of `generate`.")  # fmt: skip
@click.option("--autocast/--no-autocast", default=None, help="Whether to train fp32 weights under "
              "autocast to --dtype, as `gptkernels train` does.  [default: autocast, but for "
              "float32]",
              show_default=False)  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Measure inside graphs of "
              "torch.compile.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=60.0,
              help="Seconds after which no further class of calls is begun.")  # fmt: skip
@options.device
@click.option("--explain", is_flag=True, help="Measure nothing: print what was chosen on this "
              "machine, and why not the others.")  # fmt: skip
@click.option("--prove", type=click.IntRange(min=1), metavar="N", help="Measure nothing: time N "
              "random calls of the measured classes, \"auto\" beside all others.",
              show_default=False)  # fmt: skip
@click.option("--seed", type=int, help="Seed of --prove.  [default: a new one]",
              show_default=False)  # fmt: skip
@click.option("--json", "path", type=FILE, help="Also write what was measured to this "
              "file, as JSON.", show_default=False)  # fmt: skip
def command(
    folder: Path | None,
    shape: str | None,
    batch: int,
    tokens: int | None,
    dtype: str,
    train: bool,
    autocast: bool | None,
    compiled: bool,
    seconds: float,
    device: str,
    explain: bool,
    prove: int | None,
    seed: int | None,
    path: Path | None,
) -> int:
    """Measure which implementation is the fastest for a GPT on this machine; impl="auto" takes it
    from then on.

    FOLDER is a GPT that `generate` reads; only its config.json is looked at. For any other model,
    call gptkernels.tune(model, *inputs) in Python.

    Each candidate has to be right first, in a process of its own, and to beat PyTorch twice. The
    result is kept for this machine and software. The exit code is 1 where nothing could be
    measured; with --prove where "auto" is not what it promises: within 3% or 2 us of the best at
    95% of the calls, and nowhere more than 8% behind.

    \b
    Examples:
        gptkernels tune --config gpt2 --batch 8
        gptkernels tune gpt2-folder --generate --batch 1
        gptkernels tune --explain
        gptkernels tune --prove 200
    """
    from gptkernels.core.device import choose_device

    where = choose_device(device)
    console = plain_console()
    if explain and prove:
        raise ValueError("--explain and --prove exclude each other")
    if (explain or prove) and (folder or shape or path):
        raise ValueError(
            "--explain and --prove are about all that was measured: name no model, and no --json"
        )
    if seed is not None and not prove:
        raise ValueError("--seed is of --prove")
    if explain:
        return _explain(console, where.type)
    if prove:
        return _prove(console, where.type, prove, seed)
    if (folder is None) == (shape is None):
        raise ValueError("name a FOLDER with a model, or --config with a published one's shape")
    narrow = options.dtype(dtype)
    classes = _classes(folder, shape, narrow, where, batch, tokens, train, autocast)
    return _tune(console, classes, seconds, compiled, path)


def _classes(
    folder: Path | None,
    shape: str | None,
    dtype: Any,
    device: Any,
    batch: int,
    tokens: int | None,
    train: bool,
    autocast: bool | None,
) -> Classes:
    import torch

    from gptkernels.gpt.config import GPTConfig
    from gptkernels.tuning.models import classes_of

    config = GPTConfig.named(shape) if shape else _config_in(Path(str(folder)))
    if autocast is None:
        autocast = train and dtype != torch.float32
    if autocast and (not train or dtype == torch.float32):
        raise ValueError("--autocast goes with training in bfloat16 or float16 alone")
    size = config.block_size // 2 if tokens is None and not train else config.block_size
    return classes_of(
        config, dtype, device, batch=batch, tokens=tokens or size, train=train, autocast=autocast
    )


def _config_in(folder: Path) -> Any:
    """The configuration of the GPT in `folder`. Raises what `weights.read` raises."""
    from gptkernels.gpt import weights
    from gptkernels.gpt.config import GPTConfig

    try:
        return weights.read(folder).config
    except FileNotFoundError as error:
        try:
            GPTConfig.named(str(folder))
        except ValueError:
            raise error from None
        raise FileNotFoundError(f"{error}; for the shape alone: --config {folder}") from None


def _tune(
    console: Console, classes: Classes, seconds: float, compiled: bool, path: Path | None
) -> int:
    from gptkernels.core.tuned import Key
    from gptkernels.tuning import explanation, tune
    from gptkernels.tuning.supervisor import Outcome

    busy = tune_table.busy()
    print_text(console, f"{tune_table.classes(len(classes))} of calls")
    started = time.perf_counter()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=None)

        said = started

        def trying(key: Key, way: str) -> None:
            nonlocal said
            progress.update(bar, description=f"{key.op} {key.direction}: {way}")
            # A large class takes minutes; whoever reads a log then has no bar.
            if not console.is_terminal and time.perf_counter() - said > _LOG_EVERY_S:
                said = time.perf_counter()
                print_text(console, f"trying {key.op} {key.direction}: {way}")

        def found(outcome: Outcome) -> None:
            for line in tune_table.outcome(outcome):
                print_text(console, line)

        report = tune(classes, seconds=seconds, compile=compiled, found=found, trying=trying)
    took = time.perf_counter() - started
    print_text(console, "")
    for line in [*tune_table.foot(report, took), *busy]:
        print_text(console, line)
    if path is not None:
        from gptkernels.bench.results import write_json

        rows = [tune_table.row(e) for entry in report.entries for e in explanation.of_entry(entry)]
        write_json(path, {"seconds": took, "rows": rows})
    return 0 if report.entries else 1


def _explain(console: Console, device_type: str) -> int:
    from gptkernels.tuning import explain

    found = explain(device=device_type)
    for explanation in found:
        for line in tune_table.explained(explanation):
            print_text(console, line)
    if not found:
        print_text(console, "nothing was measured on this machine yet: run gptkernels tune")
    return 0


def _prove(console: Console, device_type: str, count: int, seed: int | None) -> int:
    from gptkernels.core import plans
    from gptkernels.truth.verify import fresh_seed
    from gptkernels.tuning import promise

    seed = fresh_seed() if seed is None else seed
    done = []
    for point in promise.points(plans.table(device_type), count, seed):
        done.append(point)
        if not point.is_kept:
            print_text(console, f"{point}: {point.excess:.1%} behind")
    for line in tune_table.proved(done):
        print_text(console, line)
    print_text(console, f"--seed {seed} draws the same calls again")
    return 0 if promise.holds(done) else 1
