"""Options that several commands have, and what their values may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from gptkernels.cli.paths import FILE
from gptkernels.core.names import check_name, nearest
from gptkernels.gpt.options import DEVICE, IMPL

PATH = click.Path(path_type=Path)
DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPE_NAMES = (*DTYPES, *_SHORT)
IMPLS = ("auto", "torch", "triton", "cuda", "cpu")
OPS = (
    "attention",
    "attention_varlen",
    "attention_decode",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Choice(click.Choice[str]):
    """A choice that names its nearest value where it is given one that it does not have."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is said of such a value."""
        return super().get_invalid_choice_message(value, ctx) + question(value, self.choices)


class Dtype(click.ParamType):
    """The name of a dtype, short or long; the long one is passed on."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The long name of a short one; whatever else was given."""
        return _SHORT.get(value, value)


def question(name: str, known: Iterable[str]) -> str:
    """What ends a sentence of click's about a name that is not known: whether the nearest of those
    `known` was meant."""
    found = nearest(name, known)
    return "" if found is None else f" Did you mean {found!r}?"


def several(name: str, parameter: str, text: str, default: str = "all") -> Decorator:
    """An option that may be repeated; `default` says what its absence means."""
    text = f"{text}; may be repeated.  [default: {default}]"
    return click.option(name, parameter, multiple=True, help=text)


def ops(*more: str) -> Decorator:
    """The option for operators, and for what `more` a command has beside them."""
    return several("--op", "ops", f"Operator: {', '.join((*OPS, *more))}")


def dtypes(default: str = "all") -> Decorator:
    """The option for dtypes."""
    return several("--dtype", "dtypes", f"Dtype: {', '.join(DTYPE_NAMES)}", default)


impls = several("--impl", "impls", f"Implementation: {', '.join(IMPLS[1:])}")
device = click.option("--device", default="auto", show_default=True, help=DEVICE)
impl = click.option("--impl", type=Choice(IMPLS), default="auto", show_default=True, help=IMPL)
json = click.option("--json", "path", type=FILE, help="Also write the rows to this file, as JSON.")
tokenizer_option = click.option(
    "--tokenizer",
    type=Choice(("bytes", "gpt1", "gpt2")),
    help="Tokenizer of the model.  [default: the model's own]",
)


def dtype(name: str) -> Any:
    """The torch.dtype of this name. Raises ValueError for any other than those of DTYPE_NAMES."""
    import torch

    return getattr(torch, _SHORT.get(name) or check_name("dtype", name, DTYPE_NAMES))
