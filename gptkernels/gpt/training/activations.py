"""Memory of the activations: what a forward pass keeps for the backward pass.

On a GPU, this is the peak of allocated memory during the forward pass, less what was allocated
before it. Elsewhere nothing counts allocations, so the storages that autograd keeps are added up,
each once. This leaves out temporaries, and what recomputation needs in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Activations:
    """Their bytes; 0 until the forward pass is over."""

    bytes: int = 0


@contextlib.contextmanager
def measured(model: nn.Module) -> Iterator[Activations]:
    """Measure what a forward pass of `model` in this context keeps; the model's own parameters and
    buffers do not count."""
    activations = Activations()
    first = next(model.parameters())
    if first.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(first.device)
        before = torch.cuda.memory_allocated(first.device)
        yield activations
        activations.bytes = torch.cuda.max_memory_allocated(first.device) - before
        return
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield activations
    activations.bytes = sum(kept.values())
