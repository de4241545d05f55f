"""A Hugging Face folder of a random GPT-2, which the tests of weights share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import shaken

from gptkernels import GPTConfig

pytest.importorskip("safetensors", reason="needs the package safetensors")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

CONFIG = GPTConfig(vocab_size=67, block_size=24, n_layer=2, n_head=3, n_embd=24, n_inner=40)


def theirs(**changes: Any) -> Any:
    """A random GPT2LMHeadModel of CONFIG's shape, every parameter large enough to matter."""
    settings = {
        "vocab_size": 67,
        "n_positions": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 24,
        "n_inner": 40,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)  # also for a module's fixture, which is made before any test seeds
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **changes}))
    return randomize(model).eval()


def randomize(model: Any) -> Any:
    return shaken(model, generator=torch.Generator().manual_seed(1))
