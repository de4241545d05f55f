"""What would be launched, for one direction of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gptkernels.bench.dry_run.machine import Machine
from gptkernels.core import native

# On sm80 and sm90 an SM keeps 1 KiB of shared memory for each CTA beside what the CTA asks for, and
# holds at most so many threads and CTAs.
_RESERVED, _MOST_THREADS, _MOST_CTAS = 1024, 2048, 32


@dataclass(frozen=True)
class Launched:
    """One launch of a dry run."""

    kernel: str
    shape: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int
    tiles: int  # of work that a persistent grid shares; 0: one a CTA
    built: dict[str, Any] | None  # the build's members, as csrc/runtime/build.h names them
    clocks: float = 0.0  # that the launcher predicts, of a multiprocessor; 0: it predicts nothing

    @property
    def ctas(self) -> int:
        """All of the grid."""
        return math.prod(self.grid)

    def resident(self, machine: Machine) -> int:
        """CTAs that an SM holds at most, by threads and shared memory; registers may allow less."""
        by_memory = machine.shared_bytes // (self.shared_bytes + _RESERVED)
        return max(1, min(by_memory, _MOST_THREADS // self.threads, _MOST_CTAS))

    def waves(self, machine: Machine, resident: int | None = None) -> float:
        """Units of work, over those that the GPU takes up at a time."""
        at_a_time = (resident or self.resident(machine)) * machine.multiprocessors
        return (self.tiles or self.ctas) / min(at_a_time, self.ctas if self.tiles else at_a_time)


@dataclass(frozen=True)
class DryRun:
    """What one direction of a problem would launch, and what was made for the GPU but cannot."""

    launches: list[Launched]
    refusals: list[tuple[str, str]]  # kernel, reason


@dataclass(frozen=True)
class Direction:
    """The forward or the backward pass of a problem."""

    name: str
    run: Callable[..., Any]  # the launcher; takes build=N where the kernels have builds
    list_name: str | None  # of the builds, in the module

    def dry_run(self, machine: Machine, build: int = -1) -> DryRun:
        """Raises ImportError where no module is built, ValueError where a launcher, or the
        build, cannot take the problem."""
        chosen = {"build": build} if build >= 0 else {}
        try:
            made = native.dry_run(
                lambda: self.run(**chosen),
                capability=machine.capability,
                multiprocessors=machine.multiprocessors,
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(str(error)) from error
        launches = [Launched(**launch) for launch in made["launches"]]
        return DryRun(launches, list(dict.fromkeys(made["refusals"])))

    def ways(
        self, machine: Machine, pick: Callable[[list[Launched]], Launched]
    ) -> list[tuple[int, DryRun, bool]]:
        """Each build for the problem: its number, its dry run, and whether the launcher's rule
        makes the same launch of that which `pick` picks. Before them, as -1, the kernel for any GPU
        where the rule takes that."""
        rule = self.dry_run(machine)
        own = pick(rule.launches)
        found = [] if own.built else [(-1, rule, True)]
        widths = {}
        for index, (build, made) in enumerate(self.tried(machine)):
            if made is not None:
                found.append((index, made, pick(made.launches) == own))
                widths[index] = build["head_width"]
        # A build for wider heads can run too, but is never faster.
        least = min(widths.values(), default=0)
        return [way for way in found if widths.get(way[0], least) == least]

    def tried(self, machine: Machine) -> Iterator[tuple[dict[str, Any], DryRun | None]]:
        """Each build, and its dry run; None for one that cannot take the problem."""
        # The builds are made for Hopper alone.
        for index, build in enumerate(self.builds() if machine.arch == "sm90" else []):
            try:
                yield build, self.dry_run(machine, index)
            except ValueError:  # of another head width, say
                yield build, None

    def builds(self) -> list[dict[str, Any]]:
        """Every way in which the kernel for Hopper is built; index is the build's number."""
        return getattr(native.dry_run_module(), self.list_name)() if self.list_name else []


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one op, or of a layer of several."""

    op: str
    text: str
    dtype: torch.dtype
    sizes: dict[str, int]
    directions: tuple[Direction, ...]
    # Parts of a layer that run as PyTorch's own operators, and why; None for an op.
    not_fused: dict[str, str] | None = None
