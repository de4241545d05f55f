"""A measuring process in which impl="cpu" of layer_norm has the fault that FAULT names; with
FAULT_IN=torch, all of PyTorch's ways of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench import timing
from gptkernels.ops.layer_norm import cpu, whole
from gptkernels.ops.layer_norm import torch as plain
from gptkernels.tuning import worker

FAULT = os.environ["FAULT"]
# The width of the rows that have the fault: other classes are as they should be.
WIDTH = int(os.environ.get("FAULT_WIDTH", "32"))
began: list[bool] = []  # not empty once ways are timed: all gates were passed before
Outputs = tuple[Tensor, ...]
calls = {"forward": 0, "backward": 0}


def before(count: int) -> None:
    """What happens instead of the call."""
    match FAULT:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(3)
        case "hang":
            time.sleep(600)
        case "raise":
            raise ValueError("no such thing\nand more of it")
        case "memory":
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")
        case "slow":
            time.sleep(2e-3)
        case "segfault late" if began:
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang late" if began:
            time.sleep(600)
        case "raise late" if began:
            raise ValueError("no such thing")


def after(direction: str, count: int, outputs: Outputs) -> None:
    """What becomes of the results, in place."""
    first = outputs[0]
    match FAULT, direction:
        case "wrong", "forward":
            first.add_(1.0)
        case "wrong weight", "backward":
            outputs[2].mul_(1.0001)  # nearer than what is looked at beside the truth
        case "wrong last row", "forward":
            first.view(-1, first.shape[-1])[-1].add_(1.0)
        case ("other bits second", _) if count == 2:
            first.mul_(1 + 2**-23)
        case ("other bits third", _) if count == 3:
            first.mul_(1 + 2**-23)


def faulty(direction: str, function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def patched(x: Tensor, *rest: Any) -> Outputs:
        if x.shape[-1] != WIDTH:
            return function(x, *rest)
        calls[direction] += 1
        if direction == os.environ.get("FAULT_DIRECTION", direction):
            before(calls[direction])
        outputs = function(x, *rest)
        if FAULT == "unwritten" and direction == "forward":
            # As if the kernel had never written it: it is as the allocation left it, and that is
            # what it should be, unless somebody looks.
            left = torch.empty_like(outputs[0])
            if left.isnan().any():
                outputs[0].view(-1, WIDTH)[-1] = left.view(-1, WIDTH)[-1]
        after(direction, calls[direction], outputs)
        return outputs

    return patched


def slowed(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def patched(*given: Any) -> Outputs:
        time.sleep(1e-3)
        return function(*given)

    return patched


PATCHED: dict[str, list[tuple[Any, str, str]]] = {
    "cpu": [
        (cpu, "layer_norm_fwd", "forward"),
        (cpu, "without_statistics", "forward"),
        (cpu, "layer_norm_bwd", "backward"),
    ],
    "torch": [(plain, "layer_norm_fwd", "forward"), (whole, "pytorch", "forward")],
}
for module, name, direction in PATCHED[os.environ.get("FAULT_IN", "cpu")]:
    setattr(module, name, faulty(direction, getattr(module, name)))
compare = timing.compare


def compared(*given: Any, **how: Any) -> Any:
    """`timing.compare`, noted."""
    began.append(True)
    return compare(*given, **how)


timing.compare = compared
if "late" in FAULT:  # slow PyTorch down, so that the other is timed for sure
    for module, name, _ in PATCHED["torch"]:
        setattr(module, name, slowed(getattr(module, name)))
if FAULT == "print":
    for line in ("hello", "{", "[1, 2]", '{"event": "entry"}', '{"event": "trying", "key": 99}'):
        print(line, flush=True)

if __name__ == "__main__":
    worker.main()
