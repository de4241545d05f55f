"""`gptkernels.tune`: measures the classes of calls that a model makes, and keeps who won."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gptkernels.core import plans, tuned_files
from gptkernels.core.choice import switched_off
from gptkernels.core.tuned import COMPILED, Entry, Key, Table
from gptkernels.tuning import supervisor
from gptkernels.tuning.contest import sizes_at
from gptkernels.tuning.problems import work
from gptkernels.tuning.recording import Classes, record


@dataclass
class Report:
    """What `tune` did.

    entries: what was measured, by this call.
    cannot: class -> why it was not.
    left: the classes for which no time was left.
    path: the file that keeps the entries; None where it could not be written, and `trouble` says
        why: then they hold for this process.
    """

    entries: list[Entry] = field(default_factory=list)
    cannot: dict[Key, str] = field(default_factory=dict)
    left: list[Key] = field(default_factory=list)
    path: Path | None = None
    trouble: str = ""

    @property
    def refused(self) -> list[tuple[Key, str, str]]:
        """The ways that may not be chosen: class, way, and why."""
        return [
            (entry.key, way, why) for entry in self.entries for way, why in entry.refused.items()
        ]


Found = Callable[[supervisor.Outcome], None]


def tune(
    model: Callable[..., Any] | Classes,
    *inputs: Any,
    train: bool = True,
    seconds: float = 60.0,
    compile: bool = False,
    found: Found = lambda outcome: None,
    trying: Callable[[Key, str], None] = lambda key, way: None,
    worker: Sequence[str] = supervisor.WORKER,
    patience_s: float | None = None,
) -> Report:
    """Measures, for the calls that a model makes, which implementation is the fastest here; from
    then on impl="auto" takes it, in this process and in later ones.

    Every implementation is first checked against fp64 in a process of its own, and has to beat
    PyTorch's by more than the noise, twice.

    Args:
        model: A module, or any function of `inputs`; or the classes that `tuning.record` collected.
        inputs: What it is called with, once, as usual: sizes of a typical step. With `train` the
            backward pass runs too; gradients, the mode and random generators are afterwards as they
            were.
        train: Whether to measure calls with gradients, else those without. Of recorded classes both
            are measured as they were made.
        seconds: After so long no further class is begun; the most work comes first.
        compile: Whether to measure calls inside graphs of torch.compile instead.
        found, trying: Called with what was found of each class, and with each class and way before
            it is tried.
        worker, patience_s: The command that measures, and how long one way may take.

    Returns:
        What was measured, and what was not. `tuning.explain` has the times.

    Raises:
        ValueError: GPTKERNELS_TUNE or GPTKERNELS_IMPL says that nothing of it would be used, or the
            model makes no call that impl="auto" could choose for.
        Whatever the model raises.
    """
    _check_used()
    if isinstance(model, Classes):
        keys = list(dict.fromkeys(model))
    else:
        keys = _classes_of(model, inputs, train)
    if compile:
        keys = list(dict.fromkeys(dataclasses.replace(key, mode=COMPILED) for key in keys))
    if not keys:
        raise ValueError("the model makes no call that impl='auto' could choose for")
    keys.sort(key=lambda key: work(key, sizes_at(key, 1.0)), reverse=True)
    report = Report(left=list(keys))
    measuring = supervisor.measure(
        keys, seconds, worker=worker, patience_s=patience_s, trying=trying
    )
    with contextlib.closing(measuring):  # also where `found` raises: the child ends
        for outcome in measuring:
            report.left.remove(outcome.key)
            if outcome.entry is None:
                report.cannot[outcome.key] = outcome.why
            else:
                report.entries.append(outcome.entry)
                _keep(outcome.entry, report)
            found(outcome)
    if report.trouble:
        warnings.warn(f"the table is kept for this process alone: {report.trouble}", stacklevel=2)
    return report


def _check_used() -> None:
    if not tuned_files.switched_on():
        raise ValueError("GPTKERNELS_TUNE is 'off': nothing that is measured would be used")
    if switched_off():
        raise ValueError("GPTKERNELS_IMPL is set: nothing that is measured would be used")


def _keep(entry: Entry, report: Report) -> None:
    """In the file, so that nothing is lost if this process is killed; and for this process."""
    device = str(dict(entry.key.facts)["device"])
    try:
        report.path = tuned_files.save(device, [entry])
    except (OSError, RuntimeError, ValueError) as error:  # no home, or another's lock
        report.path, report.trouble = None, str(error)
    table = plans.table(device)
    plans.use(device, Table([*table.entries.values(), entry]))


def _classes_of(model: Callable[..., Any], inputs: Sequence[Any], train: bool) -> list[Key]:
    """The classes of one step of the model."""
    device_types = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    devices = range(torch.cuda.device_count()) if "cuda" in device_types else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if isinstance(model, nn.Module):
            stack.enter_context(_as_it_was(model, train))
        stack.enter_context(torch.set_grad_enabled(train))
        classes = stack.enter_context(record())
        outputs = model(*inputs)
        if train:
            _backward(outputs)
    return list(classes)


def _backward(outputs: Any) -> None:
    """The backward pass of all outputs that have one; gradients are afterwards as they were."""
    roots = [x for x in _pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    before = [(leaf, leaf.grad) for leaf in _leaves_of(roots)]
    for leaf, _ in before:
        leaf.grad = None
    try:
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _leaves_of(roots: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass would add gradients to."""
    found = [x for x in roots if x.grad_fn is None]
    nodes = [x.grad_fn for x in roots if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)  # of the node that accumulates a gradient
        if isinstance(leaf, Tensor):
            found.append(leaf)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)
    return found


@contextlib.contextmanager
def _as_it_was(model: nn.Module, train: bool) -> Iterator[None]:
    """In this context the model trains or not; behind it its modes and gradients are as before."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    model.train(train)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
