"""A model in memory, transformers' or nanoGPT's, to a GPT's shape and weights.

    config     transformers: to_dict(), which has the keys of config.json
               nanoGPT: a dataclass, which has those of a checkpoint's model_args
    weights    state_dict(), by the rules for files (weights.py), copied

The model may be wrapped (torch.compile, DistributedDataParallel ...), accelerated, and on any
device. Neither package is imported. As from a folder, it is what the config and the weights say:
hooks and modules that were exchanged are not seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels.gpt import layouts, nanogpt, weights
from gptkernels.gpt.config import GPTConfig


def read(model: nn.Module, dropout: float | None = None) -> weights.Found:
    """The GPT that `model` is; `dropout` replaces its own. Its state is a copy, on its device.

    Raises TypeError for a module that is no such model, and ValueError, in one sentence, for one
    that holds an adapter or asks for something that a GPT does not have; reading the state also for
    what contradicts the configuration.
    """
    source, config = _configured(model)
    if isinstance(config, GPTConfig):
        raise TypeError("a model of transformers or nanoGPT is wanted, got a GPT of this package")
    if any(getattr(module, "peft_config", None) for module in model.modules()):
        raise ValueError(
            f"{source} holds an adapter: merge it into its model first, by merge_and_unload()"
        )
    if dataclasses.is_dataclass(config) and not hasattr(config, "to_dict"):
        found = nanogpt.found(source, vars(config), model.state_dict(), dropout)
    else:
        given = config.to_dict()
        shape, tied = layouts.read(source, given, dropout)
        layout = layouts.of_file(source, given)
        tensors = model.state_dict()
        found = weights.Found(
            shape,
            tied,
            lambda shapes: weights.converted(source, layout, tensors, shapes, shape, tied),
        )
    return found._replace(state=lambda shapes: _copies(found.state(shapes)))


def _configured(model: nn.Module) -> tuple[str, Any]:
    """The class of the outermost module that has a config, and the config."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict") or dataclasses.is_dataclass(config):
            return type(module).__name__, config
    raise TypeError(
        f"a model of transformers or nanoGPT, which has a config, is wanted, got a "
        f"{type(model).__name__}"
    )


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, each contiguous, on one device. What is one tensor, as a tied head and its embedding
    are, is copied once."""
    device = next(iter(state.values())).device
    as_written = torch.contiguous_format
    copies = {
        id(tensor): tensor.detach().to(device, copy=True, memory_format=as_written)
        for tensor in state.values()
    }
    return {name: copies[id(tensor)] for name, tensor in state.items()}
