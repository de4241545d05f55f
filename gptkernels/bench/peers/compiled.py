"""torch.compile for peers that are made for many shapes in one process."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.config

from gptkernels.bench.peers import Function, Maker, Peers

# With CUDA graphs, as "max-autotune" has them on a GPU, each call would copy its inputs first, and
# a backward pass that is called again and again would be recorded each time.
_MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def both(function: Function) -> Peers:
    """The function by torch.compile as it is, and with max-autotune."""

    def maker(mode: str | None) -> Maker:
        return lambda: compiled(function, mode=mode)

    return {"torch.compile": maker(None), "torch.compile max-autotune": maker(_MAX_AUTOTUNE)}


def compiled(function: Function, *, mode: str | None = None) -> Function:
    """torch.compile of the function, which compiles for the shapes of the first call."""
    made: Function = torch.compile(_own_code(function), dynamic=False, mode=mode)
    return made


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """A context for a forward pass, and for each backward pass behind it, of which there are
    several: autograd.grad(..., retain_graph=True) is refused by a graph that was compiled to reuse
    the memory of what was saved for it. It takes 5 microseconds, config.patch 25."""
    config = torch._functorch.config
    before, config.donated_buffer = config.donated_buffer, False
    try:
        yield
    finally:
        config.donated_buffer = before


def _own_code(function: Function) -> Function:
    """The function behind a code object of its own: Dynamo counts the shapes that it compiled for
    by the code object, and past `recompile_limit` of them runs without compiling."""

    def call(*tensors: Any, **options: Any) -> Any:
        return function(*tensors, **options)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, "call", None, call.__closure__
    )
