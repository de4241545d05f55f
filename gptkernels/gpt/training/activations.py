"""How much memory a forward pass takes that the backward pass will need: the activations.

On a GPU, the most that was allocated during the forward pass beyond what was allocated before it.
Elsewhere nothing counts allocations, so what autograd keeps is added up, each storage once: without
temporaries, and without what recomputation will take for a moment in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Activations:
    """Their bytes, once the forward pass is over."""

    bytes: int = 0


@contextlib.contextmanager
def measured(model: nn.Module) -> Iterator[Activations]:
    """Measure what is kept of a forward pass of `model` made in this context; the model's own
    parameters and buffers do not count."""
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
