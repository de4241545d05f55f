"""Options that several commands have, and what their values may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
IMPLS = ("auto", "torch", "triton", "cuda")

device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
ops = click.option("--op", "ops", multiple=True, help="Operator; may be repeated.")
impls = click.option(
    "--impl", "impls", multiple=True, help="torch, triton, cuda or cpu; may be repeated."
)
dtypes = click.option(
    "--dtype", "dtypes", multiple=True, help="float32, bfloat16 or float16; may be repeated."
)
json = click.option("--json", "path", type=PATH, help="Also write the rows to this file.")


def dtype(name: str) -> Any:
    """The torch.dtype of this name. Raises ValueError for any other than those of `dtypes`, and
    their short forms."""
    import torch

    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)
