"""`prefer`: a thread's calls run on a lower instruction set, and on that one alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import BF16, FP32, threads
from op_inputs import (
    attention_inputs,
    cache,
    gelu_mlp_inputs,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
)
from right import assert_same, run

from gptkernels import attention, attention_decode, gelu_mlp, layer_norm, linear_cross_entropy
from gptkernels.core import cpu

CPU = "cpu"
SETS = cpu.instruction_sets() if cpu.unavailable(CPU) is None else ()
pytestmark = pytest.mark.skipif(len(SETS) < 2, reason="there is no other instruction set here")
LOWER = SETS[:-1]


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    usual = cpu.module().instruction_set()
    yield
    cpu.module().prefer("")
    cpu.module().use(usual)


def isa() -> str:
    return str(cpu.module().instruction_set())


def test_a_preference_and_its_end() -> None:
    usual = isa()
    for name in SETS:
        cpu.module().prefer(name)
        assert isa() == name
    cpu.module().prefer("")
    assert isa() == usual


def test_a_preference_is_over_the_usual_one() -> None:
    first, *_, last = SETS
    cpu.module().prefer(first)
    cpu.module().use(last)
    assert isa() == first
    cpu.module().use(first)
    cpu.module().prefer(last)
    assert isa() == last
    cpu.module().prefer("")
    assert isa() == first


def test_a_preference_is_of_one_thread() -> None:
    """The others, those that are there and new ones, keep their own."""
    usual, found = isa(), []
    ours, theirs = threading.Event(), threading.Event()

    def other() -> None:
        found.append(isa())
        cpu.module().prefer(SETS[1])
        theirs.set()
        ours.wait(10)
        found.append(isa())
        cpu.module().prefer("")
        found.append(isa())

    cpu.module().prefer(SETS[0])
    worker = threading.Thread(target=other)
    worker.start()
    assert theirs.wait(10)
    assert isa() == SETS[0]
    cpu.module().prefer("")
    assert isa() == usual
    cpu.module().prefer(SETS[0])
    ours.set()
    worker.join()
    assert found == [usual, SETS[1], usual]
    assert isa() == SETS[0]


@pytest.mark.parametrize("name", ["v9", "V3", " ", "none"])
def test_an_unknown_one_is_refused(name: str) -> None:
    """In one sentence, and all stays as it was."""
    usual = isa()
    for before in ("", SETS[0]):
        cpu.module().prefer(before)
        for choose in (cpu.module().prefer, cpu.module().use):
            with pytest.raises(ValueError, match=rf"instruction sets {', '.join(SETS)}, not with"):
                choose(name)
            assert isa() == (before or usual)
    cpu.module().prefer("")
    assert isa() == usual


def test_run_on() -> None:
    usual = isa()
    assert cpu.run_on(SETS[0], lambda *given: (isa(), *given), 1, 2) == (SETS[0], 1, 2)
    assert isa() == usual

    def raises() -> None:
        assert isa() == SETS[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        cpu.run_on(SETS[0], raises)
    assert isa() == usual
    ran: list[int] = []
    with pytest.raises(ValueError, match="not with v9"):
        cpu.run_on("v9", ran.append, 1)
    assert not ran
    assert isa() == usual


def _attention() -> list[Any]:
    """Forward and backward, of long rows and with grouped heads."""
    tensors = {k: v.cpu() for k, v in attention_inputs(2, 70, H=4, Hk=2, D=64, dtype=BF16).items()}
    return run(lambda **t: attention(**t, impl="cpu"), tensors)


def _decoding() -> list[Any]:
    torch.manual_seed(0)
    tensors, rest = cache([300, 17], H=4, Hk=2, D=64, dtype=BF16)
    given = {k: v.cpu() for k, v in (tensors | rest).items()}
    return list(attention_decode(**given, return_lse=True, impl="cpu"))


def _layer_norm() -> list[Any]:
    torch.manual_seed(0)
    tensors = layer_norm_inputs(40, 200, dtype=BF16, weight=FP32, residual=BF16)
    given = {k: v.cpu() for k, v in tensors.items()}
    return [layer_norm(**given, impl="cpu"), *run(lambda **t: layer_norm(**t, impl="cpu"), given)]


def _gelu_mlp() -> list[Any]:
    """Of few rows, which the kernel multiplies, and of more."""
    found = []
    for rows in (4, 40):
        tensors = {k: v.cpu() for k, v in gelu_mlp_inputs(rows, 96, 200, dtype=BF16).items()}
        found += run(lambda **t: gelu_mlp(**t, impl="cpu"), tensors)
    return found


def _linear_cross_entropy() -> list[Any]:
    """With the gradients in the forward pass, and in a pass of their own."""
    made = linear_cross_entropy_inputs(40, 32, 300, dtype=BF16)
    targets = made.pop("targets").cpu()
    tensors = {k: v.cpu() for k, v in made.items() if v is not None}
    how: dict[str, Any] = dict(label_smoothing=0.1, z_loss=1e-2, softcap=5.0, impl="cpu")
    return [
        found
        for reduction in ("mean", "none")
        for found in run(
            lambda r=reduction, **t: linear_cross_entropy(**t, targets=targets, reduction=r, **how),
            tensors,
        )
    ]


RUNS: dict[str, Callable[[], list[Any]]] = {
    "attention": _attention,
    "attention_decode": _decoding,
    "layer_norm": _layer_norm,
    "gelu_mlp": _gelu_mlp,
    "linear_cross_entropy": _linear_cross_entropy,
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", LOWER)
@pytest.mark.parametrize("op", RUNS)
def test_results_are_those_of_the_instruction_set(op: str, name: str, count: int) -> None:
    """Bit for bit, and also of the threads that a call is split over."""
    with threads(count):
        found = cpu.run_on(name, RUNS[op])
        cpu.module().use(name)
        assert_same(found, RUNS[op]())


def test_instruction_sets_differ() -> None:
    """Else the test above could not fail."""
    found = {name: cpu.run_on(name, _attention) for name in (SETS[0], SETS[-1])}
    assert any(not torch.equal(a, b) for a, b in zip(found[SETS[0]], found[SETS[-1]], strict=True))
