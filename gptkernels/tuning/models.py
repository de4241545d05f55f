"""A GPT made small, which makes the same calls: layers repeat, and the vocabulary is a part of the
loss alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.model import GPT
from gptkernels.tuning.recording import Classes, record

_VOCABULARY = 64  # of generation
_NEW_TOKENS = 4


def classes_of(
    config: GPTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    tokens: int,
    train: bool,
    autocast: bool = False,
) -> Classes:
    """The classes of a training step of `batch` texts of `tokens` tokens, in `dtype` or, with
    `autocast`, in fp32 weights under autocast to it; or else of `generate`: of prompts of so many
    tokens, read one by one, and of steps of that many texts.

    Raises ValueError for more tokens than the model's block_size.
    """
    if tokens > config.block_size:
        raise ValueError(f"tokens must be at most block_size={config.block_size}, got {tokens}")
    layers = min(config.n_layer, 2)  # of GPT-3 every other one has a window
    vocabulary = config.vocab_size if train else _VOCABULARY
    small = dataclasses.replace(config, n_layer=layers, vocab_size=vocabulary)
    model = GPT(small).to(device, torch.float32 if autocast else dtype).train(train)
    text = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    with record() as classes:
        if train:
            with torch.autocast(device.type, dtype, enabled=autocast):
                loss: Tensor = model(text, targets=text)
            loss.backward()
        else:
            room = min(_NEW_TOKENS, config.block_size - tokens + 1)
            model.generate(text, max(1, room), temperature=0.0)
    return classes
