"""The command `gptkernels info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptkernels.cli import installed, options
from gptkernels.cli.console import plain_console, print_text


def _of(ops: str, *names: str, help: str, **more: Any) -> options.Decorator:
    """An option of some operators, None where it is not given."""
    return click.option(*names, default=None, help=f"{help}  ({ops})", **more)


@click.command("info")
@click.option(
    "--explain",
    "op",
    metavar="OP",
    help=f"Operator or layer to explain: {', '.join(options.OPS)}, transformer_layer.",
)
@click.argument("sizes", nargs=-1, metavar="[FOLDER | SIZES... DTYPE]")
@click.option(
    "--arch",
    metavar="[sm80|sm90]",
    help="GPU to launch on, an A100 (sm80) or a Hopper GPU (sm90).  [default: this machine's GPU, "
    "sm90 without one]",
)
@_of("attention*", "--kv-heads", type=int, help="Heads of k and v.  [default: H]")
@_of(
    "attention*",
    "--window",
    type=int,
    nargs=2,
    metavar="LEFT RIGHT",
    help="Keys to the left and to the right that a query sees; -1: all.  [default: -1 -1]",
)
@_of(
    "attention*, linear_cross_entropy",
    "--softcap",
    type=float,
    help="Bound of the scores, or logits, by tanh; 0: none.  [default: 0]",
)
@_of("attention*", "--alibi", is_flag=True, help="Give each head a slope of ALiBi.")
@_of("attention, attention_varlen", "--keys", type=int, help="Keys of a sequence.  [default: T]")
@_of(
    "attention, attention_varlen, transformer_layer",
    "--causal/--no-causal",
    help="Whether a query sees no later key.  [default: causal; no-causal of transformer_layer]",
)
@_of("attention", "--key-lengths", is_flag=True, help="Give each sequence a length of its own.")
@_of(
    "attention, attention_varlen",
    "--deterministic",
    is_flag=True,
    help="Ask for gradients with the same bits each time.",
)
@_of(
    "attention, attention_varlen, layer_norm, transformer_layer",
    "--dropout",
    "dropout_p",
    type=float,
    help="Probability of dropout.  [default: 0]",
)
@_of("layer_norm", "--residual", is_flag=True, help="Add a residual first.")
@_of(
    "layer_norm",
    "--prenorm/--no-prenorm",
    help="Whether the sum is returned too.  [default: prenorm]",
)
@_of(
    "gelu_mlp, layer_norm, linear_cross_entropy, transformer_layer",
    "--bias/--no-bias",
    help="Whether there are biases.  [default: bias; no-bias of linear_cross_entropy]",
)
@_of(
    "gelu_mlp",
    "--recompute",
    is_flag=True,
    help="Compute the pre-activation again in the backward pass.",
)
@_of(
    "transformer_layer",
    "--activation",
    metavar="[relu|gelu]",
    help="Activation of its MLP.  [default: relu]",
)
@_of("transformer_layer", "--norm-first", is_flag=True, help="Normalise before each branch.")
@_of("transformer_layer", "--mask", is_flag=True, help="Call it with a mask.")
def command(op: str | None, sizes: tuple[str, ...], arch: str | None, **given: Any) -> None:
    """What is installed, what can run here, and what is missing.

    `info FOLDER` shows what gptkernels.accelerate would do to the Hugging Face model in it, whose
    weights are not read.

    --explain OP shows what impl="auto" runs on this machine for a problem, why, and the times that
    `gptkernels tune` measured; and which CUDA C++ kernels would run, with tiles, stages, grid,
    waves and shared memory, and why the others would not. For a TransformerLayer it also shows
    which parts are not fused, and why. No GPU is needed. The sizes are numbers; the last word is a
    dtype: float32, bfloat16, float16 or short fp32, bf16, fp16.

    \b
    Sizes (B sequences of T tokens, H heads of width D):
        attention B T H D
        attention_varlen B T H D
        attention_decode B NEW_TOKENS CACHE H D
        gelu_mlp ROWS WIDTH INNER
        linear_cross_entropy ROWS WIDTH CLASSES
        layer_norm ROWS COLUMNS
        transformer_layer B T WIDTH HEADS INNER

    \b
    Examples:
        gptkernels info
        gptkernels info gpt2-folder
        gptkernels info --explain attention 2 8192 32 128 bf16 --kv-heads 8
        gptkernels info --explain layer_norm 8192 4096 fp32 --residual

    Each option below is of the operators in brackets; attention* stands for the three.
    """
    given = {name: value for name, value in given.items() if value is not None}
    console = plain_console()
    if op is None:
        if len(sizes) == 1 and not (arch or given) and Path(sizes[0]).is_dir():
            from gptkernels.cli import swaps

            print_text(console, str(swaps.report_of(Path(sizes[0]))))
            return
        if sizes or arch or given:
            from gptkernels.gpt import hub

            named = hub.hint(Path(sizes[0])) if len(sizes) == 1 else ""
            if named:
                raise FileNotFoundError(f"{sizes[0]} does not exist{named}")
            raise ValueError(
                "info takes nothing, a folder that exists, or --explain OP with sizes and options"
            )
        print_text(console, "\n".join(installed.lines()))
        return
    from gptkernels.bench import dry_run
    from gptkernels.cli import chosen, explain

    problem = explain.parse(op, sizes, **given)
    if op != "transformer_layer":
        print_text(console, "\n".join([*chosen.lines(problem), ""]))
    for line in explain.lines(problem, dry_run.machine_here(arch)):
        print_text(console, line)
