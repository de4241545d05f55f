"""The command `gptkernels info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptkernels.cli import installed


@click.command("info")
@click.option(
    "--explain",
    "op",
    metavar="OP",
    help="attention, attention_varlen, attention_decode, gelu_mlp, layer_norm, "
    "linear_cross_entropy or transformer_layer.",
)
@click.argument("sizes", nargs=-1, metavar="[FOLDER | SIZES... DTYPE]")
@click.option("--arch", help="sm80 or sm90; default: this machine's GPU, or sm90 without one.")
@click.option("--kv-heads", type=int, help="attention*: heads of k and v; default: H.")
@click.option("--window", type=int, nargs=2, help="attention*: keys left and right; -1: all.")
@click.option("--softcap", type=float, help="attention*, linear_cross_entropy.")
@click.option("--alibi", is_flag=True, default=None, help="attention*.")
@click.option("--keys", type=int, help="attention, attention_varlen; default: T.")
@click.option(
    "--causal/--no-causal",
    default=None,
    help="attention, attention_varlen: default yes; transformer_layer: default no.",
)
@click.option("--key-lengths", is_flag=True, default=None, help="attention.")
@click.option("--deterministic", is_flag=True, default=None, help="attention, attention_varlen.")
@click.option(
    "--dropout",
    "dropout_p",
    type=float,
    help="attention, attention_varlen, layer_norm, transformer_layer.",
)
@click.option("--residual", is_flag=True, default=None, help="layer_norm.")
@click.option("--prenorm/--no-prenorm", default=None, help="layer_norm; default: yes.")
@click.option(
    "--bias/--no-bias",
    default=None,
    help="gelu_mlp, layer_norm, transformer_layer: default yes; linear_cross_entropy: default no.",
)
@click.option("--recompute", is_flag=True, default=None, help="gelu_mlp.")
@click.option("--activation", help="transformer_layer: relu or gelu; default: relu.")
@click.option("--norm-first", is_flag=True, default=None, help="transformer_layer.")
@click.option("--mask", is_flag=True, default=None, help="transformer_layer: it gets a mask.")
def command(op: str | None, sizes: tuple[str, ...], arch: str | None, **options: Any) -> None:
    """What is installed, what can run here, and what is missing.

    `info FOLDER` shows what gptkernels.accelerate would do to the Hugging Face model in it, whose
    weights are not read.

    --explain OP shows what impl="auto" runs on this machine for a problem, why, and the times that
    `gptkernels tune` measured; and which CUDA C++ kernels would run, with tiles, stages, grid,
    waves and shared memory, and why the others would not. For a TransformerLayer it also shows
    which parts are not fused, and why. No GPU is needed. "attention*" below means the three
    attention ops. Examples:

    \b
        gptkernels info --explain attention B T H D bf16 --kv-heads 8 --no-causal
        gptkernels info --explain attention_varlen B T H D bf16
        gptkernels info --explain attention_decode B NEW_TOKENS CACHE H D bf16 --kv-heads 8
        gptkernels info --explain gelu_mlp ROWS WIDTH INNER fp16
        gptkernels info --explain linear_cross_entropy ROWS WIDTH CLASSES bf16
        gptkernels info --explain layer_norm ROWS COLS fp32 --residual --arch sm80
        gptkernels info --explain transformer_layer B T WIDTH HEADS INNER bf16 --activation gelu
    """
    given = {name: value for name, value in options.items() if value is not None}
    if op is None:
        if len(sizes) == 1 and not (arch or given) and Path(sizes[0]).is_dir():
            from gptkernels.cli import swaps

            click.echo(swaps.report_of(Path(sizes[0])))
            return
        if sizes or arch or given:
            from gptkernels.gpt import hub

            named = hub.hint(Path(sizes[0])) if len(sizes) == 1 else ""
            if named:
                raise FileNotFoundError(f"{sizes[0]} does not exist{named}")
            raise ValueError(
                "info takes nothing, a folder that exists, or --explain OP with sizes and options"
            )
        click.echo("\n".join(installed.lines()))
        return
    from gptkernels.bench import dry_run
    from gptkernels.cli import chosen, explain

    problem = explain.parse(op, sizes, **given)
    if op != "transformer_layer":
        click.echo("\n".join([*chosen.lines(problem), ""]))
    for line in explain.lines(problem, dry_run.machine_here(arch)):
        click.echo(line)
