"""TorchScript is refused in one sentence, by every function and layer, wherever a model has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE
from op_inputs import (
    attention_inputs,
    cache,
    gelu_mlp_inputs,
    layer_norm_inputs,
    linear_cross_entropy_inputs,
    varlen_inputs,
    varlen_lengths,
)
from torch import nn

import gptkernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "attention": attention_inputs,
    "attention_varlen": lambda: varlen_inputs([4, 5], [4, 5]) | varlen_lengths([4, 5], [4, 5]),
    "attention_decode": lambda: cache([5, 3])[0] | cache([5, 3])[1],
    "layer_norm": lambda: layer_norm_inputs(6, 32),
    "gelu_mlp": lambda: gelu_mlp_inputs(6, 10, 20),
    "linear_cross_entropy": lambda: linear_cross_entropy_inputs(6, 10, 20),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: gptkernels.LayerNorm(8),
    "MLP": lambda: gptkernels.MLP(8, 16),
    "CausalSelfAttention": lambda: gptkernels.CausalSelfAttention(8, 2),
    "TransformerLayer": lambda: gptkernels.TransformerLayer(8, 2, 16, batch_first=True),
    "MultiheadAttention": lambda: gptkernels.MultiheadAttention(8, 2, batch_first=True),
    "LinearCrossEntropy": lambda: gptkernels.LinearCrossEntropy(8, 16),
    "GPT": lambda: gptkernels.GPT(
        gptkernels.GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=16, block_size=8)
    ),
}


def refused() -> Any:
    return pytest.raises(NotImplementedError, match=r"^gptkernels takes no part in TorchScript, ")


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_a_function(name: str, impl: str) -> None:
    function, inputs = getattr(gptkernels, name), CALLS[name]()
    tensors = {k: x for k, x in inputs.items() if torch.is_tensor(x)}
    rest = {k: x for k, x in inputs.items() if k not in tensors}

    def call(*given: torch.Tensor) -> Any:
        return function(**dict(zip(tensors, given, strict=True)), **rest, impl=impl)

    with refused():
        torch.jit.trace(call, tuple(tensors.values()))
    with refused():
        torch.jit.script(function)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    layer = LAYERS[name]().to(DEVICE)
    with refused():
        torch.jit.script(nn.Sequential(layer))
    if name == "MultiheadAttention":  # with its weights it is PyTorch's own function
        return
    x, classes = torch.randn(2, 4, 8, device=DEVICE), torch.zeros(2, 4, dtype=int, device=DEVICE)
    given = {"GPT": (classes,), "LinearCrossEntropy": (x, classes)}.get(name, (x,))
    with refused():
        torch.jit.trace(layer, given)
