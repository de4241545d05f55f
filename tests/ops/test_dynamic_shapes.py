"""Automatic dynamic shapes: how many graphs calls of many sizes make. The second size makes a graph
for all, as PyTorch's own functions do; a dimension of size 1 has graphs of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import DEVICE
from op_inputs import attention_inputs, cache
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import gptkernels

SIZES = [(2, 7), (3, 12), (5, 9), (4, 33)]
ONES = [(1, 10), (4, 1)]


def graphs(call: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[int]:
    """How many graphs there are after each of these calls, forward and, where it has a gradient,
    backward."""
    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for arguments in calls:
        out = compiled(*arguments)
        if out.requires_grad:
            out.sum().backward()
        counts.append(counter.frame_count)
    return counts


def test_attention() -> None:
    """impl="torch" tells a window that hides nothing, here of the first size, from one that does:
    that makes another graph."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return gptkernels.attention(q, k, v, window=(8, 0), impl="torch")

    inputs = [tuple(attention_inputs(B, T, H=6).values()) for B, T in (*SIZES, *ONES)]
    assert graphs(call, inputs) == [1, 2, 3, 3, 4, 5]


def test_a_gpt_in_training() -> None:
    config = gptkernels.GPTConfig(
        n_layer=1, n_head=6, n_embd=24, vocab_size=50, block_size=64, dropout=0.1
    )
    model = gptkernels.GPT(config, device=DEVICE).train()
    texts = [torch.randint(50, size, device=DEVICE) for size in SIZES]
    assert graphs(lambda text: model(text, text), [(text,) for text in texts]) == [1, 2, 2, 2]


def test_a_cache_that_grows() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return gptkernels.attention_decode(q, k, v, lengths)

    calls = []
    for capacity in (9, 17, 33, 65):
        tensors, rest = cache([5, 3], capacity=capacity)
        calls.append((*tensors.values(), rest["cache_lengths"]))
    assert graphs(call, calls) == [1, 2, 2, 2]
