"""The commands behind `gptkernels`: argument handling and printing only.

Exit codes: 0; 1 where `verify` found a failure; 2 for bad input, with one sentence on stderr.
Commands import what they need when they run, so that `gptkernels --help` is quick.
"""

from __future__ import annotations

import dataclasses
import io
import linecache
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

import gptkernels
from gptkernels.cli import info as _info
from gptkernels.cli.generate import IMPLS, generate

_DTYPES = ("float32", "bfloat16", "float16")
_WIDTHS = (16, 44, 6, 8, 9, 9, 9, 0)
_STYLES = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write any character, and a terminal may not know all of them.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = commands.main(arguments, prog_name="gptkernels", standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", code=130)
    except ImportError as error:
        if (error.name or "").split(".")[0] == "gptkernels":
            raise
        _fail(_missing(error))
    except OSError as error:
        _fail(str(error))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if not _is_deliberate(error):
            raise
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, code: int = 2) -> None:
    print(f"gptkernels: {sentence}", file=sys.stderr)
    sys.exit(code)


def _missing(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    return (
        f"this command needs the package {error.name}, which is missing: pip install {error.name}"
    )


def _is_deliberate(error: BaseException) -> bool:
    """Whether one of this package's own `raise` statements made the error: else it is a bug."""
    frame = error.__traceback__
    if frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "")
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return module.split(".")[0] == "gptkernels" and line.lstrip().startswith("raise")


class _Commands(click.Group):
    """Builds `train` and its options, which come from dataclasses, only when it is asked for.

    Output that nobody reads any more ends a command with 141, as SIGPIPE would.
    """

    def invoke(self, context: click.Context) -> Any:
        # Here, because click itself would exit with 1, as a failed check does.
        try:
            return super().invoke(context)
        except BrokenPipeError:
            # Whoever read our output has gone; there is nobody to tell, at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(141)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_SUMMARIES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return _train_command() if name == "train" else super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        # One line each without building them: the options of `train` need PyTorch.
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


_SUMMARIES = {
    "info": "What is installed, what can run here, and what is missing.",
    "verify": "Hold every operator to the truth: the parity table.",
    "bench": "Time the operators against plain PyTorch.",
    "demo": "Train a small GPT on real text, check it, time it, write a report.",
    "train": "Train a GPT on text files or token shards.",
    "generate": "Continue a text with a trained model.",
}


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(gptkernels.__version__, prog_name="gptkernels")
@click.pass_context
def commands(context: click.Context) -> None:
    """Fused attention, LayerNorm and GELU-MLP for PyTorch, and a reference GPT."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command()
@click.option(
    "--explain",
    "op",
    metavar="OP",
    help="attention, attention_decode, mlp, layer_norm or transformer_layer.",
)
@click.argument("sizes", nargs=-1, metavar="[SIZES... DTYPE]")
@click.option("--arch", help="sm80 or sm90; this machine's GPU, else sm90.")
@click.option("--kv-heads", type=int, help="attention, attention_decode: heads of k and v.")
@click.option("--window", type=int, nargs=2, help="Likewise: keys left and right; -1: all.")
@click.option("--softcap", type=float, help="Likewise.")
@click.option("--alibi", is_flag=True, default=None, help="Likewise.")
@click.option("--keys", type=int, help="attention: keys where there are not T.")
@click.option(
    "--causal/--no-causal", default=None, help="attention: causal otherwise; transformer_layer."
)
@click.option("--key-lengths", is_flag=True, default=None, help="attention.")
@click.option("--varlen", is_flag=True, default=None, help="attention: B sequences end to end.")
@click.option("--deterministic", is_flag=True, default=None, help="attention.")
@click.option("--dropout", "dropout_p", type=float, help="all but mlp; a layer's in training.")
@click.option("--residual", is_flag=True, default=None, help="layer_norm.")
@click.option("--prenorm/--no-prenorm", default=None, help="layer_norm; prenorm otherwise.")
@click.option("--bias/--no-bias", default=None, help="all but attention; with biases otherwise.")
@click.option("--recompute", is_flag=True, default=None, help="mlp.")
@click.option("--activation", help="transformer_layer: relu or gelu; relu otherwise.")
@click.option("--norm-first", is_flag=True, default=None, help="transformer_layer.")
@click.option("--mask", is_flag=True, default=None, help="transformer_layer: it gets a mask.")
def info(op: str | None, sizes: tuple[str, ...], arch: str | None, **options: Any) -> None:
    """What is installed, what can run here, and what is missing.

    With --explain, which CUDA C++ kernels a problem runs on a GPU, with tiles, stages, grid, waves
    and shared memory, and why not another; of a TransformerLayer also what is not fused, and why.
    No GPU is needed:

    \b
        gptkernels info --explain attention B T H D bf16 --kv-heads 8 --no-causal
        gptkernels info --explain attention_decode B NEW_TOKENS CACHE H D bf16 --kv-heads 8
        gptkernels info --explain mlp ROWS WIDTH INNER fp16
        gptkernels info --explain layer_norm ROWS COLS fp32 --residual --arch sm80
        gptkernels info --explain transformer_layer B T WIDTH HEADS INNER bf16 --activation gelu
    """
    given = {name: value for name, value in options.items() if value is not None}
    if op is None:
        if sizes or arch or given:
            raise ValueError("sizes and options say what to --explain, which is missing")
        click.echo("\n".join(_info.lines()))
        return
    from gptkernels.bench import dry_run
    from gptkernels.cli import explain

    problem = explain.parse(op, sizes, **given)
    for line in explain.lines(problem, dry_run.machine_here(arch)):
        click.echo(line)


@commands.command()
@click.option("--impl", "impls", multiple=True, help="torch, triton or cuda; may be repeated.")
@click.option("--op", "ops", multiple=True, help="Operator; may be repeated.")
@click.option("--dtype", "dtypes", multiple=True, help="float32, bfloat16 or float16; repeatable.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, help="Of the random inputs; new on every run otherwise.")
@click.option("--arch", help="sm80 or sm90: the GPU that the emulator is; with --impl cuda.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows there too.")
def verify(
    impls: tuple[str, ...],
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    seed: int | None,
    arch: str | None,
    path: Path | None,
) -> int:
    """Hold every operator to the truth (the formulas in fp64), forward and gradients.

    Exits with 1 when any row fails. With --arch sm90, a row says where Hopper's own kernel did not
    run, and why.
    """
    from gptkernels.core.device import choose_device
    from gptkernels.truth import verify as table

    chosen: dict[str, Any] = {}
    if impls:
        chosen["impls"] = impls
    if ops:
        chosen["ops"] = ops
    if dtypes:
        chosen["dtypes"] = [_dtype(name) for name in dtypes]
    seed = table.fresh_seed() if seed is None else seed
    rows = table.run(device=choose_device(device), seed=seed, arch=arch, **chosen)
    counts = dict.fromkeys(_STYLES, 0)
    reasons: list[str] = []
    console = _console()
    titles = ("op", "case", "impl", "dtype", "direction", "error", "PyTorch's", "status")
    _print_cells(console, titles)
    for row in _kept((row.as_dict() for row in rows), path):
        status = row["status"]
        counts[status] += 1
        note = f": {row['tensor']}" if status == "fail" else ""
        for reason in filter(None, (row["reason"], row["note"])):
            if reason not in reasons:
                reasons.append(reason)
            note += f" ({reasons.index(reason) + 1})"
        cells = [row[name] for name in titles[:5]]
        for name in ("error", "baseline_error"):
            cells.append("" if row[name] is None else f"{row[name]:.2e}")
        _print_cells(console, [*cells, f"{status}{note}"], style=_STYLES[status])
    for number, reason in enumerate(reasons, 1):
        _print(console, f"({number}) {reason}")
    _print(console, ", ".join(f"{count} {status}" for status, count in counts.items()))
    _print(console, f"--seed {seed} gives the same inputs again")
    return 1 if counts["fail"] else 0


@commands.command()
@click.option("--op", "ops", multiple=True, help="Operator; may be repeated.")
@click.option("--impl", "impls", multiple=True, help="torch, triton or cuda; may be repeated.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--quick", is_flag=True, help="Fewer shapes and shorter measurements.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows there too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the ratios: a PNG or SVG file.")
def bench(
    ops: tuple[str, ...],
    impls: tuple[str, ...],
    device: str,
    quick: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Time the operators against plain PyTorch on the same inputs, in alternation.

    "floor" is the least time that the measured memory and arithmetic rates allow, as a share of the
    time it took.
    """
    from gptkernels import bench
    from gptkernels.bench import report
    from gptkernels.core.choice import IMPLEMENTATIONS, check_impl
    from gptkernels.core.device import choose_device

    where = choose_device(device)
    for impl in impls:
        check_impl(impl, auto=False)
    suites = [bench.suite(op) for op in ops or bench.OPERATORS]
    if plot is not None:
        report.check_plot(plot)
    console = _console()
    rows = []
    for row in _kept(
        (row for suite in suites for row in suite.rows(where, impls or IMPLEMENTATIONS, quick)),
        path,
    ):
        rows.append(row)
        cells = ", ".join(
            value if name == "time" else f"{name} {value}"
            for name, value in report.figures(row).items()
        )
        head = f"{row['op']:<16} {row['shape']:<32} {row['dtype']:<8} {row['direction']:<16}"
        _print(console, f"{head} {row['impl']:<7} {cells}")
    if plot is not None:
        report.plot(rows, plot)


@commands.command()
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 text to train on; Python's own manual."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo-report"), show_default=True
)
@click.option("--minutes", type=float, default=2.0, show_default=True, help="Time to train.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=1337, show_default=True)
def demo(text: Path | None, out: Path, minutes: float, device: str, seed: int) -> int:
    """Train a small GPT on real text, sample from it, check it against plain PyTorch, time it, and
    write a report folder.

    Exits with 1 when a check fails.
    """
    from gptkernels.cli.demo import run as main_job

    # A file or a pipe has no width of its own, and the customary 80 would fold the tables.
    console = _Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    return main_job.run(
        text=text, out=out, minutes=minutes, device=device, seed=seed, console=console
    )


commands.add_command(generate)


def _train_command() -> click.Command:
    from gptkernels.gpt.config import GPTConfig
    from gptkernels.gpt.training.config import TrainConfig

    def callback(
        files: tuple[Path, ...], out: Path, config: str | None, resume: bool, **options: Any
    ) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        names = {field.name for field in dataclasses.fields(GPTConfig)}
        model = {name: value for name, value in given.items() if name in names}
        training = {name: value for name, value in given.items() if name not in names}
        _train(files, out, config, resume, model, training)

    return click.Command(
        "train",
        callback=callback,
        help=_train.__doc__,
        params=[
            click.Argument(["files"], type=click.Path(path_type=Path), nargs=-1),
            click.Option(
                ["--out"], type=click.Path(path_type=Path), required=True, help="Folder to write."
            ),
            click.Option(["--config"], help="Start from a published model's shape, such as gpt2."),
            click.Option(["--resume"], is_flag=True, help="Go on from the checkpoint in --out."),
            *_options(GPTConfig, default={"vocab_size": "the tokenizer's"}),
            *_options(TrainConfig),
        ],
    )


def _train(
    files: tuple[Path, ...],
    out: Path,
    name: str | None,
    resume: bool,
    model: dict[str, Any],
    training: dict[str, Any],
) -> None:
    """Train a GPT on FILES, text or token shards (.bin), and write a folder: log.jsonl,
    checkpoint.pt, loss.png and model/, which `generate` and Hugging Face's transformers read.

    The first options are the model's shape, the later ones how it is trained.
    """
    from gptkernels.gpt.config import GPTConfig
    from gptkernels.gpt.tokenizer import load_tokenizer
    from gptkernels.gpt.training import train as training_module
    from gptkernels.gpt.training.config import TrainConfig
    from gptkernels.gpt.training.progress import ProgressBar

    with ProgressBar(_console()) as bar:
        if resume:
            if model or name:
                given = ", ".join(model) or "config"
                raise ValueError(f"{given}: a resumed run keeps its model's shape, leave it out")
            result = training_module.resume(out, files=files or None, observer=bar, **training)
        else:
            if not files:
                raise ValueError("files: name at least one text file or token shard to train on")
            config = TrainConfig(**training)
            shape = GPTConfig.named(name) if name else GPTConfig()
            model.setdefault("vocab_size", load_tokenizer(config.tokenizer).vocab_size)
            shape = dataclasses.replace(shape, **model)
            result = training_module.train(files, out, model=shape, config=config, observer=bar)
    if result.stopped:
        click.echo(f"stopped; go on with: gptkernels train --resume --out {out}")
        return
    click.echo(f"best validation loss {result.best_validation_loss:.4f}, everything is in {out}")


def _options(kind: type, default: dict[str, str] | None = None) -> Iterator[click.Option]:
    """One option for each field of a dataclass; None stands for "not given"."""
    types = {"int": int, "float": float, "str": str, "bool": bool}
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        shown = (default or {}).get(field.name, field.default)
        text = field.metadata.get("help") or _documented(kind, field.name)
        text += "" if shown is None else f"  [default: {shown}]"
        value_type: Any = types[str(field.type).removesuffix(" | None")]
        if value_type is bool:
            declaration = f"{flag}/--no-{flag[2:]}"
            yield click.Option([declaration], default=None, help=text)
        else:
            if field.name == "impl":
                value_type = click.Choice(IMPLS)
            yield click.Option([flag, field.name], type=value_type, default=None, help=text)


def _documented(kind: type, name: str) -> str:
    """What a class's docstring says of a field, in the line "name: ..."."""
    found = re.search(rf"^ +{name}: (.+)$", kind.__doc__ or "", re.MULTILINE)
    return found[1].rstrip(".") if found else ""


def _kept(rows: Iterable[dict[str, Any]], path: Path | None) -> Iterable[dict[str, Any]]:
    """The rows, written to `path` as they come when one is given."""
    if path is None:
        return rows
    from gptkernels.bench.report import recorded

    return recorded(rows, path)


def _dtype(name: str) -> Any:
    import torch

    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return getattr(torch, name)


class _Console(Console):
    """Leaves it to the commands what happens once nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError: rich's own method would exit with 1."""
        raise BrokenPipeError


def _console() -> Console:
    return _Console(soft_wrap=True, highlight=False)


def _print_cells(console: Console, cells: Sequence[str], style: str | None = None) -> None:
    aligned = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)]
    _print(console, " ".join(aligned).rstrip(), style)


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(escape(text), style=style)
