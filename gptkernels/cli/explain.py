"""`gptkernels info --explain`: what `impl="cuda"` would launch for a problem given in words. No GPU
is needed and nothing is launched (`gptkernels.bench.dry_run`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptkernels.bench import dry_run
from gptkernels.bench.dry_run import Direction, DryRun, Launched, Machine, Problem
from gptkernels.cli.options import dtype as given_dtype
from gptkernels.core.names import check_name

# For each op: the function that makes a problem from sizes and options, and an example of sizes.
_OPS: dict[str, tuple[Callable[..., Problem], str]] = {
    "attention": (dry_run.attention, "2 8192 32 128 bf16"),
    "attention_varlen": (
        functools.partial(dry_run.attention, varlen=True),
        "2 8192 32 128 bf16",
    ),
    "attention_decode": (dry_run.attention_decode, "64 1 8192 32 128 bf16"),
    "gelu_mlp": (dry_run.gelu_mlp, "8192 4096 16384 bf16"),
    "layer_norm": (dry_run.layer_norm, "8192 4096 bf16"),
    "linear_cross_entropy": (dry_run.linear_cross_entropy, "8192 768 50257 bf16"),
    "transformer_layer": (dry_run.transformer_layer, "8 512 768 12 3072 bf16"),
}


def parse(op: str, words: Sequence[str], **options: Any) -> Problem:
    """The problem that a command line names: sizes and a dtype in words, options by name.

    Raises ValueError for a word or an option that is not as the op takes it.
    """
    problem, example = _OPS[check_name("op", op, _OPS)]
    parameters = inspect.signature(problem).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    usage = f"{op} takes {' '.join(names)}, such as {example}"
    if len(words) != len(names):
        raise ValueError(f"{usage}; got {' '.join(words) or 'nothing'}")
    *sizes, dtype = words
    for name, size in zip(names, sizes, strict=False):
        if not (size.isascii() and size.isdigit()):
            raise ValueError(f"{usage}; {name} cannot be {size!r}")
    for name in options:
        if name not in {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}:
            raise ValueError(f"{op} has no option {name.replace('_', '-')}")
    return problem(*map(int, sizes), given_dtype(dtype), **options)


def lines(problem: Problem, machine: Machine) -> Iterator[str]:
    """The report, line by line. Raises ImportError where no module is built."""
    dtype = str(problem.dtype).removeprefix("torch.")
    yield f"{problem.op} {problem.text}, {dtype}"
    yield (
        f"dry run for {machine.arch}: {machine.name}, {machine.multiprocessors} multiprocessors; "
        'this is impl="cuda"'
    )
    yield from _layer_lines(problem)
    for direction in problem.directions:
        made = direction.dry_run(machine)
        yield ""
        yield direction.name
        keys = [(launched.kernel, launched.shape, launched.grid) for launched in made.launches]
        for place, launched in enumerate(made.launches):
            if keys[place] in keys[:place]:
                continue
            count = keys.count(keys[place])
            times = f", {count} times" if count > 1 else ""
            yield f"  {launched.kernel} on {launched.shape}{times}"
            yield from (f"    {line}" for line in described(launched, machine))
        for kernel, reason in made.refusals:
            yield f"  not {kernel}: {reason}"
        yield from _build_lines(direction, machine, made)


def _layer_lines(problem: Problem) -> Iterator[str]:
    if problem.not_fused is None:
        return
    yield ""
    if problem.not_fused:
        yield "not fused: these run as PyTorch's own operators"
        yield from (f"  {part}: {reason}" for part, reason in problem.not_fused.items())
    else:
        yield "fused throughout"
    yield "  (the projections before and after attention are PyTorch's products on a GPU)"


def _build_lines(direction: Direction, machine: Machine, made: DryRun) -> Iterator[str]:
    chosen = {launched.built["name"] for launched in made.launches if launched.built}
    cannot = 0
    for index, (build, possible) in enumerate(direction.tried(machine)):
        if possible is None:
            cannot += 1
            continue
        runs = "runs" if build["name"] in chosen else "could run"
        yield f"  build {index}, {build['name']}: {runs}"
    if cannot:
        yield f"  {_count(cannot, 'build')} cannot take it"


def described(launched: Launched, machine: Machine) -> Iterator[str]:
    """Tile, stages and the like, where they are known; grid, shared memory, waves."""
    if launched.built:
        yield built_as(launched.built)
    grid = "x".join(str(n) for n in launched.grid if n > 1 or n == launched.grid[0])
    resident = launched.resident(machine)
    cluster = f" in clusters of {launched.cluster}" if launched.cluster > 1 else ""
    tiles = f", {launched.tiles} tiles" if launched.tiles else ""
    yield (
        f"grid {grid}{cluster} of {launched.threads} threads, "
        f"{launched.shared_bytes / 1024:.1f} KiB of shared memory: at most {resident} "
        f"{'CTA' if resident == 1 else 'CTAs'} an SM{tiles}, {launched.waves(machine):.2f} waves"
    )


def built_as(build: dict[str, Any]) -> str:
    """A build's members in one line."""
    tile = "x".join(str(n) for n in (build["tile_m"], build["tile_n"], build["tile_k"]) if n)
    parts = [f"{build['name']}: tile {tile}", _count(build["stages"], "stage")]
    if build["consumers"]:
        turns = " taking turns" if build["pingpong"] else ""
        parts.append(_count(build["consumers"], "consumer warpgroup") + turns)
    if build["cluster"] > 1:
        parts.append(f"clusters of {build['cluster']}")
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
