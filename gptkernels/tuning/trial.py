"""One way on one call: it has to be right before it is timed.

The gates: it runs; its outputs and gradients pass the parity rule against fp64 (on parts, of the
inputs that are timed), and are nowhere far from those of impl="torch", though all memory it gets
holds NaN; and they have equal bits in three runs.
PyTorch's own attention may differ from run to run, and has no gate but the first two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.core import plans
from gptkernels.core.tuned import COMPILED, PYTORCH, Entry, Key, Table
from gptkernels.truth import parity
from gptkernels.tuning.problems.problem import SEED, Problem

AUTO = "auto"
_RUNS, _MOST_RUNS, _SHORT_S = 3, 30, 5e-3


class Refused(Exception):
    """A way that may not be chosen; the message is the reason."""


@dataclass
class Trial:
    """A way that passed.

    forward_s, backward_s: of the fastest of its runs, roughly.
    error, limit: against fp64.
    call: the whole call, to be timed.
    """

    way: str
    forward_s: float
    backward_s: float
    error: float
    limit: float
    call: Callable[[], Any]


class Runner:
    """Runs the ways of one call."""

    def __init__(self, key: Key, problem: Problem) -> None:
        self._key, self._problem = key, problem
        self._compiled = key.mode == COMPILED
        if self._compiled:  # else the limit of recompilations would end in eager mode
            torch._dynamo.reset()
        if not self._compiled:
            self._signature, self._chosen = _looked_up(key, problem)

    def trial(self, way: str) -> Trial:
        """The way through all gates. Raises Refused, or what the way raises."""
        forward, backward = self.passes(way)
        torch.manual_seed(SEED)
        with parity.poisoned_outputs():
            state, outputs = forward()
            gradients = backward(state, outputs)
        error, limit = self._problem.check(outputs, gradients)
        if not error <= limit:
            raise Refused(f"it is wrong: error {error:.1e}, limit {limit:.1e}")
        first = [x.detach() for x in (*outputs, *gradients)]
        seconds: list[tuple[float, float]] = []
        # Without poison, whose writing takes time; of a short call often, for its least time.
        while len(seconds) < _RUNS - 1 or _is_short(seconds):
            torch.manual_seed(SEED)
            started = self._clock()
            state, outputs = forward()
            between = self._clock()
            gradients = backward(state, outputs)
            seconds.append((between - started, self._clock() - between))
            if not self._may_differ(way) and not _same_bits(first, (*outputs, *gradients)):
                raise Refused("it is not deterministic: two runs gave different bits")
        forward_s, backward_s = (min(times) for times in zip(*seconds, strict=True))
        return Trial(way, forward_s, backward_s, error, limit, self.call(way))

    def call(self, way: str) -> Callable[[], Any]:
        """The whole call by this way, or by that of the tables, "auto", and nothing else: no check,
        no new leaves."""
        forward, backward = self.passes(way)
        if not self._problem.training:
            return lambda: forward()[1]

        def both() -> Any:
            return backward(*forward())

        return both

    def passes(
        self, way: str
    ) -> tuple[Callable[[], tuple[Any, list[Tensor]]], Callable[[Any, list[Tensor]], list[Tensor]]]:
        """The forward pass, which returns what the other needs, and the backward pass; that returns
        nothing for a call without gradients."""
        problem = self._problem
        leaves = problem.leaves()
        problem.cotangents()
        if self._compiled:
            function = torch.compile(problem.forward, dynamic=False)
            impl = way.partition("+")[0]
        else:
            function, impl = problem.forward, "auto"
        plan = self._chosen if way == AUTO else plans.of_way(way)
        known, signature = plans.known, None if self._compiled else self._signature

        def forward() -> tuple[Any, list[Tensor]]:
            if signature is not None:
                known[signature] = plan
            if problem.training:
                return leaves, function(leaves, impl)
            with torch.no_grad():
                return leaves, function(leaves, impl)

        def backward(state: Any, outputs: list[Tensor]) -> list[Tensor]:
            return problem.backward(state, outputs) if problem.training else []

        return forward, backward

    def _may_differ(self, way: str) -> bool:
        """Whether a way may give other bits in another run: PyTorch's own in attention, whose
        fused backward passes do so on a GPU. The other ops promise equal bits."""
        return is_pytorchs(way) and self._problem.op.startswith("attention")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._problem.device

    def _clock(self) -> float:
        if self._problem.device.type == "cuda":
            torch.cuda.synchronize(self._problem.device)
        return time.perf_counter()


def _is_short(seconds: list[tuple[float, float]]) -> bool:
    return len(seconds) < _MOST_RUNS and sum(map(sum, seconds)) < _SHORT_S


def is_pytorchs(way: str) -> bool:
    """Whether PyTorch's own kernels compute it, which need no proof to be chosen."""
    parts = way.split("+")
    return all(part == PYTORCH or plans.implementation(part) == "torch" for part in parts)


def _looked_up(key: Key, problem: Problem) -> tuple[Hashable, plans.Plan]:
    """The signature by which the op looks the call's plan up, and the plan by the tables. Nothing
    but PyTorch runs. Raises NotImplementedError where no plan is looked up, or where the call is of
    another class."""
    device = problem.device.type
    before = plans.table(device)
    plans.use(device, Table([Entry(key, ((1.0, "torch"),))]))
    try:
        with plans.recording() as calls, torch.set_grad_enabled(problem.training):
            problem.forward(problem.leaves())
            signatures = list(plans.known)
    finally:
        plans.use(device, before)
    if len(signatures) != 1 or not calls:
        raise NotImplementedError("impl='auto' does not look a plan up for this call")
    if calls[0].key != key:
        raise NotImplementedError(f"the call that was made is of another class ({calls[0].key})")
    return signatures[0], plans.of(calls[0])


def _same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
