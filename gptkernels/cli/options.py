"""Options that several commands have, and what their values may be."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
IMPLS = ("auto", "torch", "triton", "cuda")

device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
ops = click.option("--op", "ops", multiple=True, help="Operator; may be repeated.")
impls = click.option(
    "--impl", "impls", multiple=True, help="torch, triton, cuda or cpu; may be repeated."
)
json = click.option("--json", "path", type=PATH, help="Also write the rows to this file.")
