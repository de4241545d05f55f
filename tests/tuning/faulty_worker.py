"""A measuring process in which layer_norm of some widths has a fault: FAULTS maps a width to the
name of its fault. impl="cpu" has it, or, where the name ends with " in PyTorch", all of PyTorch's
ways."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench import timing
from gptkernels.ops.layer_norm import cpu, whole
from gptkernels.ops.layer_norm import torch as plain
from gptkernels.tuning import worker

FAULTS: dict[int, str] = {int(C): name for C, name in json.loads(os.environ["FAULTS"]).items()}
STDOUT = os.dup(1)  # the worker leaves only its events there
NO_EVENTS = (
    b"hello\n",
    b"{\n",
    b"[1, 2]\n",
    b'{"event": "entry"}\n',
    b'{"event": "trying", "key": 99, "way": "cpu"}\n',
)
Outputs = tuple[Tensor, ...]
calls: Counter[tuple[str, str, int]] = Counter()
comparing = False
timed: set[int] = set()  # widths of which a way is timed, or was: it has passed all gates


def fault_of(place: str, width: int) -> str:
    what, _, where = FAULTS.get(width, "").partition(" in ")
    if place == (where or "cpu"):
        return what
    # PyTorch slower, so that the other is timed for sure.
    return "slow" if what.endswith(" late") else ""


def before(fault: str, direction: str, width: int, count: int) -> None:
    """What happens instead of the call."""
    if fault.endswith(" late"):
        if width not in timed:
            return
        fault = fault.removesuffix(" late")
    match fault:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(3)
        case "hang":
            os.write(STDOUT, b"hangs\n")
            time.sleep(600)
        case "raise":
            raise ValueError("no such thing\nand more of it")
        case "memory":
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")
        case "slow" if direction == "forward":
            time.sleep(2e-3)
        case "print" if count == 1:
            print("hello")
            for line in NO_EVENTS:
                os.write(STDOUT, line)


def after(fault: str, direction: str, count: int, outputs: Outputs) -> None:
    """What becomes of the results, in place."""
    first = outputs[0]
    match fault, direction:
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
        case "unwritten", "forward":
            # As if the kernel had never written it: it is as the allocation left it, and that is
            # what it should be, unless somebody looks.
            left = torch.empty_like(first)
            if left.isnan().any():
                first.view(-1, first.shape[-1])[-1] = left.view(-1, first.shape[-1])[-1]


def faulty(place: str, direction: str, function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    def patched(x: Tensor, *rest: Any) -> Outputs:
        width = x.shape[-1]
        fault = fault_of(place, width)
        if comparing:
            timed.add(width)
        calls[place, direction, width] += 1
        count = calls[place, direction, width]
        before(fault, direction, width, count)
        outputs = function(x, *rest)
        after(fault, direction, count, outputs)
        return outputs

    return patched


for place, direction, module, name in (
    ("cpu", "forward", cpu, "layer_norm_fwd"),
    ("cpu", "forward", cpu, "without_statistics"),
    ("cpu", "backward", cpu, "layer_norm_bwd"),
    ("PyTorch", "forward", plain, "layer_norm_fwd"),
    ("PyTorch", "forward", whole, "pytorch"),
):
    setattr(module, name, faulty(place, direction, getattr(module, name)))
compare = timing.compare


def compared(*given: Any, **how: Any) -> Any:
    """`timing.compare`, noted."""
    global comparing
    comparing = True
    try:
        return compare(*given, **how)
    finally:
        comparing = False


timing.compare = compared

if __name__ == "__main__":
    worker.main()
